from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgekd.calibrate.bodies import body_of
from edgekd.calibrate.shapes import chains
from edgekd.cli import main
from edgekd.latency.table import Conditions, LatencyTable, Point, frame_of


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def table(make_model, tmp_path: Path) -> Path:
    """A table of made-up costs that covers the tiny BERT at 64 tokens."""
    arch = body_of(make_model("bert")).student.arch
    frame = frame_of(arch, "fp32", 1, 64)
    rows = []
    for shape in chains(arch):
        layers = tuple((layer.source, layer.heads, layer.neurons) for layer in shape.layers)
        rows.append(Point(frame=frame, layers=layers, ms=1.0 + sum(heads + neurons for _, heads, neurons in layers)))
    conditions = Conditions(target="npu-x", kind="vendor_estimate", caveat="Not to be relied upon.")
    LatencyTable(conditions=conditions, points=tuple(rows)).refit().save(tmp_path / "npu-x.json")
    return tmp_path / "npu-x.json"


def test_predict_says_what_it_is_and_on_what_it_rests(make_model, table: Path) -> None:
    model = make_model("bert")
    done = invoke("predict", model, "--table", table)
    assert done.exit_code == 0, done.output
    assert "ms PREDICTED from the vendor's estimates" in done.output
    assert "Not to be relied upon." in done.output
    found = json.loads(invoke("predict", model, "--table", table, "--json").output)
    arch = body_of(model).student.arch
    assert found["predictions"][0]["ms"] == pytest.approx(1.0 + sum(x.heads + x.neurons for x in arch.layers), rel=0.02)
    assert found["predictions"][0]["kind"] == "predicted"


def test_predict_refuses_an_unknown_form_before_it_loads_the_model(table: Path, tmp_path: Path) -> None:
    done = invoke("predict", tmp_path / "no-model", "--table", table, "--lowering", "fp23")
    assert done.exit_code == 2
    assert f"unknown lowering in {table}: 'fp23' (did you mean 'fp32'?); choose one of: fp32" in done.output


def test_predict_refuses_what_no_table_covers(make_model, table: Path) -> None:
    model = make_model("bert")
    done = invoke("predict", model, "--table", table, "--sequence", 128)
    assert done.exit_code == 2
    assert "knows sequence 64 only, not 128" in done.output
    done = invoke("predict", model, "--target", "nobody")
    assert done.exit_code == 2
    assert "no latency table of nobody; make one with `edgekd calibrate --target nobody`" in done.output


@pytest.mark.slow
def test_calibrate_measures_and_goes_on_as_a_process(make_model, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "edgekd", "calibrate", "--body", make_model("bert"), "--lowering", "fp32",
        "--shape", "1x8", "--threads", "1", "--mixed", "2", "--held-out", "2", "--out", tmp_path / "t.json", "--json",
    ]  # fmt: skip
    first = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["points"] > 8
    assert result["held_out"]["n"] == 2
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ)
    assert json.loads(again.stdout)["points"] == result["points"]
    assert "within 5 %" in invoke(*command[3:-1]).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "64"), "expected BATCHxTOKENS, for instance 1x64"),
        (("--shape", "²x4"), "expected BATCHxTOKENS, for instance 1x64"),
        (("--minutes", "nan"), "'nan' is not a finite number"),
        (("--threads", "4096"), "4096 threads asked, but this process may use"),
        (("--body", "bert-3"), "unknown body 'bert-3'"),
        (
            ("--lowering", "int8_dynamc"),
            "unknown lowering for onnxruntime 'int8_dynamc' (did you mean 'int8_dynamic'?)",
        ),
        (("--target", "npu-ethos-u85-512", "--lowering", "fp32"), "'fp32'; choose one of: int8_tflite"),
        (("--target", "gpu-cuda"), "is unavailable, so there is nothing to calibrate"),
    ],
)
def test_calibrate_says_what_is_wrong(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = invoke("calibrate", "--out", tmp_path / "t.json", *options)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "t.json").exists()
