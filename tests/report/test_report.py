from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from edgekd.report.card import model_card
from edgekd.report.html import write_report
from edgekd.report.terminal import rows, show

MANIFEST = {
    "edgekd": "0.1.0",
    "task": "text-classification",
    "teacher": {"metric": "accuracy", "value": 0.9, "n": 200, "p50_ms": 16.0, "size_bytes": 90_000_000},
    "artifact": {
        "file": "onnx/model.onnx",
        "size_bytes": 15_000_000,
        "precision": "int8",
        "lowering": "int8_dynamic",
        "opset": 18,
        "needs": {"opset": 18, "domains": [], "onnxruntime": ">=1.22", "session_options": {}},
        "shape": "4 layers of 384",
        "parity": {
            "float": {"max_abs": 1e-6, "agreement": 1.0, "n": 200},
            "shipped": {"max_abs": 0.1, "agreement": 0.99, "n": 200},
        },
    },
    "quality": {
        "metric": "accuracy",
        "split": "test",
        "value": 0.88,
        "ci95": [0.83, 0.92],
        "n": 200,
        "retained": 0.9778,
    },
    "latency": [
        {
            "target": "local",
            "kind": "measured",
            "batch": 1,
            "sequence": 64,
            "threads": 1,
            "p50_ms": 2.0,
            "p95_ms": 2.2,
            "p99_ms": 2.5,
            "teacher_p50_ms": 16.0,
            "speedup": 8.0,
        }
    ],
    "verdict": [{"target": "local", "status": "pass", "reason": "speedup 8× reaches the budget of 4×"}],
    "ledger": [
        {
            "stage": "search",
            "metric": None,
            "latency": {"kind": "unavailable", "reason": "x"},
            "seconds": 1.0,
            "details": {"a": "<b>"},
        },
        {
            "stage": "prune",
            "metric": 0.5,
            "latency": {"kind": "measured", "p50_ms": 5.0, "p95_ms": 5.5, "speedup": 3.2},
            "size_bytes": 60_000_000,
            "seconds": 2.0,
            "details": {},
        },
    ],
    "rounds": [],
    "versions": {"python": "3.11"},
}


@pytest.fixture
def manifest() -> dict:
    return copy.deepcopy(MANIFEST)


def test_the_card_has_metric_latency_kind_and_a_way_to_run_it(manifest):
    card = model_card(manifest)
    assert "needs ONNX Runtime >=1.22" in card
    assert card.startswith("---\npipeline_tag: text-classification\n")
    assert "0.8800 (95 % interval 0.8300–0.9200)" in card
    assert (
        "measured p50 / p95 / p99 (batch 1, 64 tokens, 1 thread(s)) | 16.000 ms | 2.000 / 2.200 / 2.500 ms (8.00×)"
        in card
    )
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    compile(code.group(1), "card", "exec")


def test_what_is_unavailable_has_a_reason_and_no_figure(manifest):
    manifest["latency"] = [
        {"target": "board", "kind": "unavailable", "batch": 1, "sequence": 64, "reason": "no such provider"}
    ]
    line = next(line for line in model_card(manifest).splitlines() if line.startswith("| board"))
    assert "unavailable: no such provider" in line
    assert " ms" not in line.split("|")[3]
    assert rows(manifest)[-1][3:6] == ("", "", "")


def test_a_card_without_data_states_no_metric(manifest):
    manifest["quality"] = manifest["teacher"] = None
    card = model_card(manifest)
    assert "accuracy" not in card
    assert "| ONNX file |  | 15.00 MB |" in card


def test_the_table_goes_from_teacher_over_stages_to_artifact(manifest, capsys):
    table = rows(manifest)
    assert [row[0].strip() for row in table] == ["teacher (fp32)", "search", "prune", "artifact (int8)"]
    assert table[2] == ("  prune", "0.5000", "", "5.000 ms", "5.500 ms", "3.20×", "60.00 MB")
    assert table[1][1:5] == ("", "", "", "")
    show({"local": manifest}, manifest["verdict"])
    printed = capsys.readouterr().out
    assert "97.8% of the teacher's kept" in printed
    assert max(len(line) for line in printed.splitlines()[:-1]) <= 100


def tables(card: str) -> list[list[str]]:
    """The lines of each table of a Markdown text."""
    blocks = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    return [block.splitlines() for block in blocks]


def test_no_table_or_line_of_a_card_is_broken_by_what_a_compiler_says(manifest):
    odd = "no <board> | here:\n| a | b |\n# Error\n"
    gone = {"kind": "unavailable", "reason": odd}
    estimated = {**manifest["latency"][0], "target": "npu", "kind": "vendor_estimate", "p95_ms": None, "notes": [odd]}
    manifest["latency"] = [{**gone, "target": "board", "batch": 1}, estimated]
    manifest["verdict"][0]["reason"] = odd
    manifest["ledger"] = [
        {"stage": "prune", "kept": False, "why": odd, "before": {"latency": gone}, "after": {"latency": gone}}
    ]
    card = model_card(manifest)
    assert [len(table) for table in tables(card)] == [6, 3]
    for table in tables(card):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(bars) == 1, table
    text = "no &lt;board> \\| here: \\| a \\| b \\| # Error"
    assert f"**pass** ({text})." in card
    assert f"- {text}\n" in card
    assert f"The latency on `board` is not known: {text}." in card
    assert f"unavailable: {text} |" in card
    assert f"- prune: {text}" in card
    assert "<board>" not in card
    assert "\n# Error" not in card


def test_the_page_is_complete_in_itself_and_escapes_what_it_shows(manifest, tmp_path):
    file: Path = tmp_path / "report.html"
    write_report(file, {"local": manifest}, manifest["verdict"], "teacher: <script>")
    page = file.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("<rect") == 3
    assert "2.000 ms" in page
