from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd import devices, host
from edgekd.devices import COMPILERS, DEVICES, ort, process
from edgekd.errors import ModelError, StageError, TargetError
from edgekd.target import Target, list_targets, load_target

REQUEST = {"subjects": [{"name": "m", "path": "m.onnx", "session": {"threads": 1}}]}


@pytest.fixture
def local() -> Target:
    return load_target("local")


@pytest.mark.parametrize("name", list_targets())
def test_every_target_names_a_runtime_there_is(name: str) -> None:
    assert load_target(name).runtime in {**DEVICES, **COMPILERS}


def test_an_unknown_runtime_is_refused(local: Target) -> None:
    with pytest.raises(TargetError, match=r"unknown runtime 'onnx' \(did you mean 'onnxruntime'\?\)"):
        devices.device_of(Target(**{**vars(local), "runtime": "onnx"}))


def test_this_machine_can_be_measured_and_others_say_why_not(local: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.unavailable(local) is None
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"avx2", "avx512_vnni"}))
    assert devices.unavailable(load_target("cpu-x86-vnni")) is None
    assert "has avx512_vnni" in str(devices.unavailable(load_target("cpu-x86-avx2")))
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"avx2"}))
    assert devices.unavailable(load_target("cpu-x86-avx2")) is None
    assert "has no avx512_vnni" in str(devices.unavailable(load_target("cpu-x86-vnni")))


def test_a_missing_runtime_or_provider_is_named(local: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Target(**{**vars(local), "providers": ("CUDAExecutionProvider", "CPUExecutionProvider")})
    monkeypatch.setattr(ort, "available_providers", lambda: ("CPUExecutionProvider",))
    assert "has no CUDAExecutionProvider here (it has CPUExecutionProvider)" in str(ort.unavailable(cuda))
    monkeypatch.setattr(ort, "available_providers", lambda: ())
    assert ort.unavailable(cuda) == "onnxruntime is not installed"


def test_the_models_options_go_before_the_targets(local: Target) -> None:
    options = {"graph_optimization": "basic", "disabled_optimizers": ["A"], "config": {"x": "1", "y": "1"}}
    target = Target(**{**vars(local), "options": options})
    prepared = ort.prepare(target, threads=2, options={"graph_optimization": "all", "config": {"y": "2"}})
    assert prepared == {
        "engine": "onnxruntime",
        "providers": [["CPUExecutionProvider", {}]],
        "threads": 2,
        "graph_optimization": "all",
        "disabled_optimizers": ["A"],
        "config": {"x": "1", "y": "2"},
    }


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("raise RuntimeError('broken worker')", StageError, "exit code 1\n(?s:.*)broken worker"),
        ("import os; os.abort()", ModelError, r"crashed \(SIGABRT\) on m\.onnx"),
        ("import time; time.sleep(60)", TargetError, "measuring m took longer than 1 s"),
        ("pass", StageError, "exit code 0 and said nothing"),
    ],
)
def test_a_failing_worker_is_explained(tmp_path: Path, code: str, error: type[Exception], message: str) -> None:
    (tmp_path / "worker.py").write_text(code)
    with pytest.raises(error, match=message):
        ort.run(
            load_target("local"), tmp_path / "worker.py", REQUEST, folder=tmp_path, timeout=1 if "sleep" in code else 30
        )


def test_the_worker_gets_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    environment = process.environment(2)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "MALLOC_ARENA_MAX" not in environment


def test_a_trace_is_summed_by_operator_and_provider_without_the_warm_up(tmp_path: Path) -> None:
    def node(operator: str, ts: int, dur: int, provider: str = "CPUExecutionProvider") -> dict[str, object]:
        arguments = {"op_name": operator, "provider": provider}
        return {"cat": "Node", "name": f"n_{operator}_kernel_time", "ts": ts, "dur": dur, "args": arguments}

    events: list[dict[str, object]] = [
        {"cat": "Session", "name": "model_run", "ts": ts, "dur": 99} for ts in (0, 100, 200)
    ]
    events += [node("MatMul", ts + 1, 3000 if ts else 9000) for ts in (0, 100, 200)]
    events += [node("Add", ts + 2, 500, "CUDAExecutionProvider") for ts in (100, 100, 200, 200)]
    (tmp_path / "trace.json").write_text(json.dumps(events))
    first, second = ort.placement(tmp_path / "trace.json", warm_runs=1)
    assert (first.type, first.calls, first.ms, first.share) == ("MatMul", 1, 3.0, 0.75)
    assert (second.type, second.provider, second.calls, second.ms) == ("Add", "CUDAExecutionProvider", 2, 1.0)
    with pytest.raises(StageError, match="holds 3 runs, 3 of them warm-up"):
        ort.placement(tmp_path / "trace.json", warm_runs=3)


def test_devices_are_light_to_import() -> None:
    code = "import sys, edgekd.devices, edgekd.latency.verdict as v; print({'onnxruntime', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
