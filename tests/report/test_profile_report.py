from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.dom import minidom

import numpy as np
import pytest

from edgekd.report.charts import Chart, Raw, Series, charts
from edgekd.report.profile import RAW_SAMPLES, bounds, figure, page, write_profile
from edgekd.report.profile_terminal import show_profile
from edgekd.report.svg import draw, steps, ticks

EVIL = '"><script>alert(1)</script>&</script>'


def document(**more: Any) -> dict[str, Any]:
    latency = {
        "target": "local", "kind": "measured", "batch": 1, "sequence": None, "threads": 1, "n": 240,
        "p50_ms": 1.0, "p90_ms": 1.2, "p95_ms": 1.3, "p99_ms": 1.5, "mean_ms": 1.05, "min_ms": 0.9,
        "ci95_ms": [0.99, 1.01], "p90_ci95_ms": [1.1, 1.3], "p95_ci95_ms": [1.2, 1.5], "p99_ci95_ms": [1.3, None],
        "mean_ci95_ms": [1.0, 1.1], "load_ms": 5.0, "first_ms": 2.0, "peak_rss_mb": 60.0, "throughput": 950.0,
        "teacher_p50_ms": None, "speedup": None, "speedup_ci95": None, "reason": "", "notes": ["noisy [bold]"],
    }  # fmt: skip
    rows = [
        {"batch": 1, "p50_ms": 1.0, "p95_ms": 1.1, "ci95_ms": [0.9, 1.1],
         "throughput": 990.0, "throughput_ci95": [900.0, 1100.0]},
        {"batch": 2, "p50_ms": 1.5, "p95_ms": 1.7, "ci95_ms": [1.4, None],
         "throughput": 1300.0, "throughput_ci95": [1200.0, 1400.0]},
        {"batch": 64, "reason": f"out of memory {EVIL}"},
    ]  # fmt: skip
    operators = [{"type": f"Op{i}", "provider": "CPUExecutionProvider", "calls": 2, "ms": 0.1, "share": 0.05}
                 for i in range(18)]  # fmt: skip
    placement = [{"provider": "CPUExecutionProvider", "nodes": 36, "node_share": 1.0, "time_share": 1.0}]
    verdict = [{"target": "local", "status": "pass", "reason": f"p95 is within {EVIL}"}]
    return {"model": f"models/{EVIL}.onnx", "latency": [latency], "verdict": verdict, "batches": rows,
            "operators": operators, "placement": placement, "conditions": {"path": EVIL}, **more}  # fmt: skip


def raw(name: str = "model", n: int = 240) -> Raw:
    return Raw(name, np.random.default_rng(0).lognormal(0, 0.1, n), np.repeat(np.arange(n // 2), 2)[:n])


class Page(HTMLParser):
    """Tags, attributes and the embedded JSON of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.embedded, self.inside = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for key, value in attrs if key in ("src", "href") or key.startswith("on")]
        self.inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        self.embedded += data if self.inside else ""


def test_the_page_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    write_profile(tmp_path / "report.html", document(), [raw(EVIL), raw("other")])
    text = (tmp_path / "report.html").read_text()
    read = Page(text)
    # One script, which is data; nothing is fetched and nothing a name says becomes a tag.
    assert read.tags.count("script") == 1
    assert '<script type="application/json"' in text
    assert read.links == []
    assert {"link", "img", "iframe"}.isdisjoint(read.tags)
    assert "<script>alert" not in text
    embedded = json.loads(read.embedded)
    assert embedded["model"] == f"models/{EVIL}.onnx"
    assert len(embedded["samples"][0]["ms"]) == 240
    assert embedded["latency"] == document()["latency"]


def test_every_drawing_is_well_formed_and_within_its_frame() -> None:
    drawn = charts(document(), [raw(EVIL), raw("other")])
    keys = [chart.key for chart in drawn]
    assert keys == [
        "distribution",
        "percentiles",
        "drift",
        "batch-latency",
        "batch-throughput",
        "operators",
        "placement",
    ]
    for chart in drawn:
        svg = minidom.parseString(draw(chart)).documentElement
        width, height = float(svg.getAttribute("width")), float(svg.getAttribute("height"))
        for line in svg.getElementsByTagName("polyline"):
            for point in line.getAttribute("points").split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_bars_are_as_long_as_their_values_and_the_rest_is_summed() -> None:
    (operators,) = [chart for chart in charts(document(), []) if chart.key == "operators"]
    assert operators.bars[-1] == ("4 more", pytest.approx(0.2), "20.0%")
    bars = Chart(key="k", title="t", x_label="x", bars=(("a", 2.0, "2"), ("b", 1.0, "1")))
    widths = [
        float(rect.getAttribute("width")) for rect in minidom.parseString(draw(bars)).getElementsByTagName("rect")
    ]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.1)


def test_the_histogram_holds_every_sample_up_to_its_edge_and_counts_the_others() -> None:
    ms = np.concatenate([np.linspace(1.0, 1.1, 990), np.full(10, 50.0)])
    (chart, *_) = charts(document(), [Raw("m", ms, np.arange(1000))])
    (line,) = chart.series
    assert sum(line.y[::2]) == pytest.approx(99.0)
    assert "10 of 1000 of m" in chart.caption
    assert max(line.x) < 50


def test_a_sweep_leaves_out_what_has_no_figure_and_open_ends() -> None:
    (chart,) = [chart for chart in charts(document(), []) if chart.key == "batch-latency"]
    (line,) = chart.series
    assert (line.x, line.y, line.low, line.high) == ((1.0, 2.0), (1.0, 1.5), (0.9, 1.4), (1.1, 1.5))


def test_many_samples_are_embedded_as_percentiles_of_blocks() -> None:
    embedded = json.loads(Page(page(document(), [raw(n=RAW_SAMPLES + 2)], [])).embedded)
    (samples,) = embedded["samples"]
    assert samples["n"] == RAW_SAMPLES + 2
    assert all(low <= middle <= high <= most for low, middle, high, most in samples["blocks_min_p50_p95_max_ms"])


def test_an_estimate_is_marked_and_has_no_percentiles() -> None:
    known = document()["latency"][0]
    latency = {**dict.fromkeys(known), "target": "npu", "kind": "vendor_estimate", "batch": 1, "p50_ms": 0.5}
    stated = {"ms": 0.5, "low_ms": 0.4, "high_ms": 0.6, "cycles": 10.0, "caveat": "Not real.", "figures": {},
              "options": {}, "files": [], "notes": []}  # fmt: skip
    text = page({"model": "m", "latency": [latency], "verdict": [], "estimate": stated, "conditions": {}}, [], [])
    assert "VENDOR ESTIMATE, not measured" in text
    assert "Not real." in text
    table = text.split("<table>")[1].split("</table>")[0]
    assert re.findall(r"<tr><td>(.*?)</td>", table) == ["estimate"]


def test_the_terminal_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    show_profile(document())
    shown = capsys.readouterr().out
    for text in (
        "p99",
        "1.3 – ?",
        "batch 64: no figure. out of memory",
        "note: noisy [bold]",
        "PASS: p95 is within",
        "CPU",
    ):
        assert text in shown


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.2, 3.3), (0.0, 123456.0), (-2.0, 5.0), (1e-6, 2e-6)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 12
    assert all(low - 1e-12 <= value <= high * (1 + 1e-9) for value in found)
    assert all(float(f"{value:.3g}") == pytest.approx(value, rel=1e-9, abs=1e-15) for value in found)


def test_steps_of_a_logarithmic_axis() -> None:
    assert steps(0.3, 7.0) == pytest.approx([0.5, 1, 2, 5])
    assert len(steps(1.01, 1.9)) >= 2
    assert ticks(1.0, 1.0) == [1.0]


def test_equal_samples_can_be_drawn() -> None:
    for chart in charts(document(), [Raw("m", np.ones(10), np.arange(10))]):
        minidom.parseString(draw(chart))


def test_figures_and_open_ends() -> None:
    assert (figure(None), figure(1.23456), bounds(None), bounds([1.0, None])) == ("–", "1.235", "", "1 – ?")


def test_png_files_have_what_the_page_has(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from edgekd.report.png import write_plots

    line = Series(name="$x_1$", x=(1.0, 2.0), y=(1.0, 2.0), low=(0.9, 1.9), high=(1.1, 2.1), points=True)
    extra = Chart(key="extra", title="a $\\frac{", x_label="x", series=(line,), log=True)
    files = write_plots(tmp_path / "plots", [*charts(document(), [raw()]), extra])
    assert {file.name for file in files} >= {"distribution.png", "drift.png", "operators.png", "extra.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
