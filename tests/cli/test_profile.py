from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from edgekd import devices
from edgekd.cli import main
from edgekd.devices import Estimate, Operator, ort
from edgekd.latency import bench, profiling
from edgekd.latency.bench import Settings, Subject
from edgekd.latency.stats import Samples
from edgekd.target import Target

QUICK = Settings(blocks=24, block_ms=0.05, min_runs=48, max_seconds=5.0, window_ms=1.0, warmup_seconds=0.1)
TARGET = """title: Test
runtime: {runtime}
device: {device}
precisions: [fp32]
shapes: {shapes}
providers: [{providers}]
threads: 1
source: made up
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [batch, 4] times a matrix, and a Relu."""
    matrix = numpy_helper.from_array(np.eye(4, dtype=np.float32), "matrix")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "matrix"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])],
        [matrix],
    )
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "Settings", lambda **_: QUICK)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models named `slow…` take 2 ms and all others 1 ms, so that nothing hangs on the machine."""

    def measure(models: Sequence[Subject], **_: object) -> list[Samples]:
        taken = {item.name: 2.0 if item.path.name.startswith("slow") else 1.0 for item in models}
        return [Samples(name=name, ms=np.full(200, ms), block=np.arange(200)) for name, ms in taken.items()]

    monkeypatch.setattr(bench, "measure", measure)


def target_file(folder: Path, **fields: str) -> Path:
    usual = {"runtime": "onnxruntime", "device": "cpu", "shapes": "dynamic", "providers": "CPUExecutionProvider"}
    file = folder / "device.yaml"
    file.write_text(TARGET.format(**{**usual, **fields}))
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


@pytest.mark.usefixtures("quick")
def test_json_holds_everything_that_was_asked(model: Path, tmp_path: Path) -> None:
    done = run(
        model, "--threads", 1, "--batches", "1,2", "--sequences", "8", "--per-operator", "--baseline", model,
        "--samples", tmp_path / "raw.csv", "--session", "graph_optimization=disabled",
        "--session", "session.intra_op.allow_spinning=0", "--json", "-q",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    (latency,) = document["latency"]
    assert latency["kind"] == "measured"
    assert latency["mean_ci95_ms"][0] <= latency["mean_ms"] <= latency["mean_ci95_ms"][1]
    assert [row["batch"] for row in document["batches"]] == [1, 2]
    assert document["sequences"] == [{"sequence": 8, "reason": "the model has no sequence dimension"}]
    # Nothing was fused, because the option reached the session.
    assert {row["type"] for row in document["operators"]} == {"MatMul", "Relu"}
    (share,) = document["placement"]
    assert (share["provider"], share["node_share"]) == ("CPUExecutionProvider", 1.0)
    assert document["comparison"]["a"]["latency"]["kind"] == "measured"
    conditions = document["conditions"]
    assert conditions["session"]["config"] == {"session.intra_op.allow_spinning": "0"}
    assert {"onnxruntime", "numpy", "python", "edgekd"} <= set(conditions["versions"])
    assert len(conditions["models"]["model"]["sha256"]) == 64
    assert re.match(r"\d{4}-\d\d-\d\dT", conditions["date"])
    rows = list(csv.DictReader((tmp_path / "raw.csv").open()))
    assert {row["model"] for row in rows} == {"model", "baseline", "batch 1", "batch 2"}


@pytest.mark.usefixtures("quick")
def test_cpus_are_the_ones_it_stays_on(model: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    done = run(model, "--cpus", cpu, "--json", "-q")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["conditions"]["cpus"] == [cpu]


@pytest.mark.usefixtures("steady")
def test_compare_says_which_is_faster(model: Path) -> None:
    slow = model.with_name("slow.onnx")
    slow.write_bytes(model.read_bytes())
    done = run("--compare", slow, model, "--threads", 1, "-q")
    assert done.exit_code == 0, done.output
    assert "B is 2× faster than A (99 % interval 2–2)" in done.stdout
    assert f"A {slow}" in done.stdout
    document = json.loads(run("--compare", model, slow, "--threads", 1, "-q", "--json").stdout)["comparison"]
    assert (document["status"], document["ratio"]) == ("slower", 0.5)
    assert document["a"]["model"] == str(model)
    assert document["b"]["latency"]["p50_ms"] == 2.0
    same = run("--compare", model, model, "--threads", 1, "-q")
    assert "same time within 1%" in same.stdout


class Board:
    """ONNX Runtime's CPU provider under another name: MatMul runs on the accelerator, Relu falls back."""

    def __init__(self, *, relu: str) -> None:
        self.relu = relu

    def unavailable(self, target: Target) -> str | None:
        return None

    def prepare(self, target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return ort.prepare(replace(target, providers=("CPUExecutionProvider",)), threads=threads, options=options)

    def run(self, target: Target, worker: Path, request: Mapping[str, Any], **place: Any) -> dict[str, Any]:
        return ort.run(target, worker, request, **place)

    def placement(self, trace: Path, *, warm_runs: int) -> Sequence[Operator]:
        rows = ort.placement(trace, warm_runs=warm_runs)
        assert {row.type for row in rows} == {"MatMul", "Relu"}
        return [replace(row, provider=self.relu if row.type == "Relu" else "NpuExecutionProvider") for row in rows]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("relu", "code"), [("CPUExecutionProvider", 3), ("NpuExecutionProvider", 0)])
def test_a_node_that_falls_back_is_exit_3_when_none_may(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relu: str, code: int
) -> None:
    monkeypatch.setitem(devices.DEVICES, "onnxruntime", Board(relu=relu))
    file = target_file(tmp_path, providers="NpuExecutionProvider, CPUExecutionProvider", device="npu")
    options = ["--target", file, "--session", "graph_optimization=disabled", "-q", "--json"]
    done = run(model, *options, "--no-fallback")
    assert done.exit_code == code, done.output
    document = json.loads(done.stdout)
    assert document["latency"][0]["kind"] == "measured"
    if code:
        assert "not all of the model runs on NpuExecutionProvider: Relu ×1 on CPUExecutionProvider" in done.stderr
        assert [row["type"] for row in document["fallback"]] == ["Relu"]
        assert [row["nodes"] for row in document["placement"]] == [1, 1]
    else:
        assert "fallback" not in document
    assert run(model, *options, "--per-operator").exit_code == 0


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([Operator("Conv", "TensorrtExecutionProvider", 9, 1.0, 0.9),
          Operator("Add", "CUDAExecutionProvider", 2, 0.1, 0.1)], "Add ×2 on CUDAExecutionProvider"),
        ([], "is not known"),
    ],
)  # fmt: skip
def test_placement_of_other_providers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Operator], said: str
) -> None:
    monkeypatch.setattr(ort, "unavailable", lambda target: None)
    monkeypatch.setattr(bench, "trace_operators", lambda *_, **__: rows)
    providers = "TensorrtExecutionProvider, CUDAExecutionProvider, CPUExecutionProvider"
    done = run(model, "--target", target_file(tmp_path, providers=providers, device="gpu"), "--no-fallback", "-q")
    assert done.exit_code == 3
    assert said in done.stderr


@pytest.mark.usefixtures("steady")
def test_a_missed_budget_and_a_fallback_are_both_3_and_the_verdict_is_shown(model: Path) -> None:
    done = run(model, "--threads", 1, "--latency-p95-ms", 0.5, "-q")
    assert done.exit_code == 3
    assert "FAIL: p95 1 ms" in done.stdout


class Compiler:
    def unavailable(self, target: Target) -> str | None:
        return None

    def compile(self, target: Target, model: Path, folder: Path, *, timeout: float) -> Estimate:
        (folder / "model.bin").write_bytes(b"")
        rows = (Operator("Conv", "NPU", 3, None, None), Operator("Gather", "CPU", 1, None, None))
        return Estimate(ms=0.5, files=(folder / "model.bin",), operators=rows, caveat="Not real performance.")


@pytest.fixture
def npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(devices.COMPILERS, "ethos-u", Compiler())
    file = tmp_path / "npu.yaml"
    text = "title: T\nruntime: ethos-u\ndevice: npu\nprecisions: [int8]\nshapes: dynamic\nthreads: 1\nsource: made up\n"
    file.write_text(text)
    return file


def test_an_estimate_is_never_called_measured(model: Path, npu: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = run(model, "--target", npu, "--latency-p95-ms", 1, "-q", "--out", tmp_path / "kept", "--report", report)
    assert done.exit_code == 0, done.output
    assert "VENDOR ESTIMATE" in done.stdout
    assert "note: Not real performance." in done.stdout
    assert "PASS: the vendor estimate of 0.5 ms" in done.stdout
    assert "p95 " not in done.stdout.split("PASS")[0]
    assert "not measured" in done.stdout
    assert (tmp_path / "kept" / "model.bin").is_file()
    assert "VENDOR ESTIMATE, not measured" in report.read_text()
    assert "Not real performance." in report.read_text()
    raw = run(model, "--target", npu, "--samples", tmp_path / "raw.csv", "-q")
    assert "nothing was measured" in raw.stderr
    assert not (tmp_path / "raw.csv").exists()
    fallen = run(model, "--target", npu, "--no-fallback", "-q")
    assert fallen.exit_code == 3
    assert "not all of the model runs on the NPU: Gather ×1 on CPU" in fallen.stderr


def test_free_dimensions_are_refused_by_a_target_that_needs_fixed_ones(model: Path, npu: Path) -> None:
    npu.write_text(npu.read_text().replace("dynamic", "static"))
    done = run(model, "--target", npu, "-q")
    assert done.exit_code == 2
    assert "edgekd export STUDENT --target npu" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either MODEL or --compare A B"),
        (["MODEL", "--compare", "MODEL", "MODEL"], "give either MODEL or --compare A B"),
        (["--compare", "MODEL"], "requires 2 arguments"),
        (["--compare", "MODEL", "MODEL", "--baseline", "MODEL"], "has its baseline already"),
        (["MODEL", "--batches", "1,zwei"], "expected whole numbers like 1,2,4,8"),
        (["MODEL", "--batches", "0"], "expected whole numbers like 1,2,4,8"),
        (["MODEL", "--cpus", "-1"], "expected whole numbers like 0,1"),
        (["MODEL", "--cpus", "0,0"], "name every CPU once"),
        (["MODEL", "--latency-p95-ms", "nan"], "'nan' is not a finite number"),
        (["MODEL", "--baseline", "MODEL", "--speedup", "inf"], "'inf' is not a finite number"),
        (["MODEL", "--value", "x=many"], "expected NAME=16000"),
        (["MODEL", "--value", "5"], "expected NAME=16000"),
        (["MODEL", "--value", "z=5"], "--value: unknown input 'z'"),
        (["MODEL", "--session", "graph_optimisation=all"], "did you mean 'graph_optimization'?"),
        (["MODEL", "--session", "graph_optimization=most"], "unknown graph optimization level 'most'"),
        (["MODEL", "--session", "spin"], "expected KEY=VALUE"),
        (["MODEL", "--feeds", "MODEL", "--batches", "2"], "--batches says what inputs to make up, --feeds brings them"),
        (["MODEL", "--samples", "nowhere/raw.csv"], "there is no folder nowhere"),
        (["MODEL", "--report", "nowhere/report.html"], "there is no folder nowhere"),
        (["MODEL", "--out", "kept"], "no compiled model to keep"),
    ],
)
def test_what_does_not_go_together_is_refused_before_measuring(
    model: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("it measured"))
    done = run(*(str(model) if word == "MODEL" else word for word in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_models_that_would_do_different_work_are_not_compared(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("it measured"))
    fixed = tmp_path / "fixed.onnx"
    graph = onnx.load(model)
    for value in (graph.graph.input[0], graph.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(graph, fixed)
    done = run("--compare", model, fixed, "-q")
    assert done.exit_code == 2, done.output
    assert f"{fixed} a batch of 2, {model} a batch of 1; give --batch 2" in done.stderr
    done = run(model, "--sequence", 5, "-q")
    assert done.exit_code == 2, done.output
    assert "--sequence would have no effect" in done.stderr


@pytest.mark.usefixtures("steady")
def test_two_fixed_sizes_are_compared_with_a_note(model: Path, tmp_path: Path) -> None:
    for size in (2, 3):
        graph = onnx.load(model)
        for value in (graph.graph.input[0], graph.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = size
        onnx.save(graph, tmp_path / f"of{size}.onnx")
    done = run("--compare", tmp_path / "of2.onnx", tmp_path / "of3.onnx", "--threads", 1, "-q")
    assert done.exit_code == 0, done.output
    assert "the models do different work" in " ".join(done.stdout.split())


def test_inputs_that_do_not_fit_are_refused_before_measuring(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("it measured"))
    np.savez(tmp_path / "in.npz", y=np.zeros((2, 4), np.float32))
    done = run(model, "--feeds", tmp_path / "in.npz", "-q")
    assert done.exit_code == 2, done.output
    assert f"do not fit {model}: unknown input 'y'; choose one of: x; input x is missing" in done.stderr
    np.savez(tmp_path / "in.npz", x=np.array([{}], dtype=object))
    done = run(model, "--feeds", tmp_path / "in.npz", "-q")
    assert done.exit_code == 2, done.output
    assert "holds Python objects" in done.stderr
    assert "pickle" not in done.stderr


def test_plots_need_matplotlib_and_say_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(model, "--plots", tmp_path / "plots", "-q")
    assert done.exit_code == 2
    assert "pip install 'edgekd[plots]'" in done.stderr
    assert not (tmp_path / "plots").exists()


def test_help_groups_every_option() -> None:
    shown = run("--help").stdout
    for title in ("Where:", "Inputs:", "Budget:", "More to measure:", "Results:"):
        assert f"\n{title}\n" in shown
    other = shown.split("\nOther:\n")[1]
    assert other.split() == ["-h,", "--help", "Show", "this", "message", "and", "exit."]


def test_as_a_process_it_prints_only_json_on_stdout(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgekd", "profile", str(model), "--threads", "1", "--no-fallback", "--json",
               "--report", str(tmp_path / "report.html")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["latency"][0]["peak_rss_mb"] > 0
    assert "measuring" in done.stderr
    assert "tracing operators" in done.stderr
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("steady")
def test_names_that_look_like_markup_are_only_names(model: Path, tmp_path: Path) -> None:
    # The slash between folder and file makes a closing tag of the two.
    (tmp_path / "w[").mkdir()
    odd = tmp_path / "w[" / "b]<i>.onnx"
    odd.write_bytes(model.read_bytes())
    done = run(odd, "--threads", 1, "--report", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert str(odd) in done.stdout
    assert "<i>" not in (tmp_path / "report.html").read_text()
