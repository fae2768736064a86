"""How table, page and card show what each stage bought, for ledgers of today and of before."""

from __future__ import annotations

import base64
import copy
import json
import re

import pytest

from edgekd.report.card import model_card
from edgekd.report.gains import gains, shared
from edgekd.report.html import write_report
from edgekd.report.terminal import rows, show

WEIGHED = ("before", "after", "kept", "forced", "why", "folder", "shared")


def measured(p50, **more):
    return {"kind": "measured", "p50_ms": p50, "ci95_ms": [p50 - 0.1, p50 + 0.1], **more}


def side(latency, size, metric):
    return {"latency": latency, "size_bytes": size, "metric": metric, "metric_ci95": [metric - 0.02, metric + 0.02]}


PARITY = {"max_abs": 1e-6, "agreement": 1.0, "n": 200}
MANIFEST = {
    "edgekd": "0.1.0",
    "task": "text-classification",
    "teacher": {"metric": "accuracy", "value": 0.9, "n": 200, "p50_ms": 4.0, "size_bytes": 4_000_000},
    "artifact": {
        "file": "onnx/model.onnx",
        "size_bytes": 1_000_000,
        "precision": "int8",
        "lowering": "int8_dynamic",
        "opset": 18,
        "shape": "2 layers of 32",
        "parity": {"float": PARITY, "shipped": PARITY},
    },
    "quality": {"metric": "accuracy", "split": "test", "value": 0.8, "ci95": [0.7, 0.9], "n": 200, "retained": 0.89},
    "latency": [{"target": "local", "kind": "measured", "batch": 1, "p50_ms": 2.0, "p95_ms": 2.2, "p99_ms": 2.5}],
    "verdict": [],
    "rounds": [],
    "versions": {},
}


@pytest.fixture
def manifest():
    """A manifest with a supernet, a search, a kept, a forced, a rolled back and an unmeasured stage."""
    gone = {"kind": "unavailable", "reason": "no <board> | here"}
    plain = {"seconds": 61.7, "details": {}, "latency": gone, "metric": 0.9, "size_bytes": 4_000_000}
    faster = measured(2.0, ratio=0.5, ratio_ci99=[0.4, 0.6])
    weighed = {**plain, "before": side(measured(4.0), 4_000_000, 0.9), "after": side(faster, 1_000_000, 0.8)}
    unknown = {**plain, "before": {"latency": gone}, "after": {"latency": gone, "size_bytes": 1_000_000}}
    ledger = [
        {**plain, "stage": "supernet", "shared": True, "folder": "01-supernet"},
        {**plain, "stage": "search", "folder": "02-search", "metric": None},
        {**weighed, "stage": "prune", "kept": True, "forced": False, "why": "faster"},
        {**weighed, "stage": "operators", "kept": True, "forced": True, "why": "of force"},
        {**weighed, "stage": "distill", "kept": False, "forced": False, "why": "no <gain>"},
        {**unknown, "stage": "quantize", "kept": True, "forced": False, "why": "not measured"},
    ]
    return copy.deepcopy({**MANIFEST, "ledger": ledger})


@pytest.fixture
def old(manifest):
    """The same ledger as versions without the guard wrote it."""
    for entry in manifest["ledger"]:
        for key in WEIGHED:
            entry.pop(key, None)
    return manifest


def test_each_weighed_stage_has_a_row_with_intervals_and_decision(manifest):
    found = {row["stage"]: row for row in gains(manifest)}
    assert [row["cells"][1] for row in found.values()] == ["kept", "kept by force", "rolled back", "kept"]
    assert found["prune"]["cells"][2:] == (
        "4.000 (3.900–4.100) → 2.000 (1.900–2.100) ms",
        "0.500 (0.400–0.600)",
        "4.00 → 1.00 MB",
        "0.9000 (0.8800–0.9200) → 0.8000 (0.7800–0.8200)",
    )
    assert found["quantize"]["cells"][2:] == ("unavailable: no <board> | here", "", "? → 1.00 MB", "? → ?")
    assert [row["remark"] for row in found.values()] == [False, True, True, True]


def test_the_terminal_tells_what_was_kept_and_what_was_not(manifest, capsys):
    show({"local": manifest, "other": manifest}, [])
    lines = capsys.readouterr().out.splitlines()
    assert (
        "prune: kept, p50 4.000 → 2.000 ms, ratio 0.500 (0.400–0.600), 4.00 → 1.00 MB, 0.9000 → 0.8000 on validation"
        in lines
    )
    assert "distill: no <gain>" in lines
    assert "supernet: trained once in 62 s, shared by 2 targets" in lines
    assert any(line.startswith("  distill ↩ ") for line in lines)
    assert shared(manifest, 1) == ["supernet: trained once in 62 s"]


def test_the_card_keeps_its_table_whole_whatever_a_reason_says(manifest):
    card = model_card(manifest)
    table = [
        line for line in card.split("## What each stage bought")[1].split("\n## ")[0].splitlines() if line[:1] == "|"
    ]
    assert len(table) == 6
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in table)
    assert "- distill: no &lt;gain>" in card
    assert "| distill | rolled back |" in card


def test_the_page_shows_and_escapes_them(manifest, tmp_path):
    write_report(tmp_path / "report.html", {"local": manifest}, [], "")
    page = (tmp_path / "report.html").read_text()
    assert "<td>rolled back</td>" in page
    assert "0.500 (0.400–0.600)" in page
    assert "no &lt;gain&gt;" in page
    assert "<gain>" not in page
    assert "<board>" not in page


def test_ledgers_of_before_render_as_they_did(old, tmp_path, capsys):
    assert gains(old) == shared(old, 2) == []
    write_report(tmp_path / "report.html", {"local": old}, [], "")
    page, card = (tmp_path / "report.html").read_text(), model_card(old)
    for text in (page, card):
        assert "What each stage bought" not in text
    assert [row[0].strip() for row in rows(old)][1:-1] == [entry["stage"] for entry in old["ledger"]]
    show({"local": old}, [])
    assert "kept," not in capsys.readouterr().out


PICTURE = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def test_the_candidates_of_search_are_shown_as_a_picture_in_which_nothing_runs(manifest, tmp_path):
    folder = tmp_path / "02-search"
    folder.mkdir()
    (folder / "front.svg").write_text(PICTURE)
    (folder / "front.json").write_text(json.dumps({"reason": "the <best> that fits"}))
    write_report(tmp_path / "report.html", {"local": manifest}, [], "")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "the &lt;best&gt; that fits" in page
    [data] = re.findall(r'<img alt="candidates of search" src="data:image/svg\+xml;base64,([^"]*)">', page)
    assert base64.b64decode(data).decode() == PICTURE


@pytest.mark.parametrize("folder", ["../02-search", "/02-search", "run/../02-search", "02-search/..", "", "03-prune"])
def test_only_stage_folders_of_the_run_are_looked_into(manifest, tmp_path, folder):
    for place in (tmp_path / "02-search", tmp_path / "run" / "02-search", tmp_path / "run"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "front.svg").write_text(PICTURE)
    manifest["ledger"] = [{**manifest["ledger"][1], "folder": folder}]
    write_report(tmp_path / "run" / "report.html", {"local": manifest}, [], "")
    assert "<img" not in (tmp_path / "run" / "report.html").read_text()


def test_a_damaged_front_costs_only_its_reason(manifest, tmp_path):
    (tmp_path / "02-search").mkdir()
    (tmp_path / "02-search" / "front.svg").write_text(PICTURE)
    (tmp_path / "02-search" / "front.json").write_text("[1]")
    write_report(tmp_path / "report.html", {"local": manifest}, [], "")
    assert "data:image/svg+xml" in (tmp_path / "report.html").read_text()


def test_what_search_leaves_in_its_work_folder_is_kept_beside_the_student(make_recipe, tmp_path, monkeypatch):
    from dataclasses import replace

    from edgekd.pipeline import compress

    def plan(settings, student, ctx):
        (ctx.work / "front.svg").write_text(PICTURE)
        (ctx.work / "front.json").write_text('{"reason": "it fits"}')
        (ctx.work / "scratch").write_text("not kept")
        return replace(student, plan=student.arch)

    monkeypatch.setattr("edgekd.search.strategy.choose", plan)
    recipe = make_recipe(
        targets=["gpu-cuda"],
        stages=[{"search": {}}, {"prune": {"samples": 8}}],
        budget={"size_mb": 100, "sequence": 12},
    )
    result = compress(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "01-search"
    assert (folder / "front.svg").read_text() == PICTURE
    assert not (folder / "scratch").exists()
    assert result.manifests["gpu-cuda"]["ledger"][0]["folder"] == "01-search"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "it fits" in page
    assert "data:image/svg+xml" in page
