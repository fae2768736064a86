from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.devices import DEVICES, openvino
from edgekd.errors import ModelError
from edgekd.latency import profile
from edgekd.latency.bench import Settings, Subject, measure, trace_operators
from edgekd.target import Target

QUICK = Settings(blocks=12, block_ms=0.1, min_runs=120, max_seconds=5.0, window_ms=1.0, warmup_seconds=0.2)


def target(**changes: Any) -> Target:
    facts: dict[str, Any] = {"runtime": "openvino", "device": "cpu", "precisions": ("fp32",), "threads": 1}
    return Target(name="ov", title="ov", **{**facts, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [batch_size, 512] times a matrix, normalized."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Softmax", ["y"], ["z"], axis=1)],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", 512])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch_size", 512])],
        [numpy_helper.from_array(np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32), "w")],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_precision_is_f32_unless_asked() -> None:
    prepared = openvino.prepare(target(), threads=3, options={"graph_optimization": "basic", "config": {"a.b": "1"}})
    assert prepared == {
        "engine": "openvino",
        "device": "CPU",
        "threads": 3,
        "static": False,
        "config": {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "3", "INFERENCE_PRECISION_HINT": "f32"},
    }
    asked = target(shapes="static", options={"precision": "bf16", "config": {"PERFORMANCE_HINT": "THROUGHPUT"}})
    prepared = openvino.prepare(asked, threads=1, options={})
    assert prepared["static"]
    assert prepared["config"]["INFERENCE_PRECISION_HINT"] == "bf16"
    assert prepared["config"]["PERFORMANCE_HINT"] == "THROUGHPUT"


def test_threads_are_for_the_cpu_and_the_npu_knows_no_f32() -> None:
    assert set(openvino.prepare(target(options={"device": "GPU"}), threads=1, options={})["config"]) == {
        "PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT",
    }  # fmt: skip
    assert set(openvino.prepare(target(options={"device": "NPU"}), threads=1, options={})["config"]) == {
        "PERFORMANCE_HINT"
    }


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "available_devices", lambda: ("CPU", "GPU.0", "GPU.1"))
    assert openvino.unavailable(target()) is None
    assert openvino.unavailable(target(options={"device": "GPU"})) is None
    assert openvino.unavailable(target(options={"device": "GPU.1"})) is None
    reason = openvino.unavailable(target(options={"device": "NPU"}))
    assert reason == "OpenVINO finds no NPU here (it finds CPU, GPU.0, GPU.1)"
    monkeypatch.setattr(openvino, "available_devices", tuple)
    assert openvino.unavailable(target()) == "openvino is not installed: pip install 'edgekd[openvino]'"


def test_nodes_are_summed_by_type(tmp_path: Path) -> None:
    nodes = [("FullyConnected", 60.0), ("FullyConnected", 30.0), ("Softmax", 10.0)]
    told = {"engine": "openvino", "device": "CPU", "nodes": [{"type": kind, "us": us} for kind, us in nodes]}
    (tmp_path / "trace.json").write_text(json.dumps(told))
    first, second = openvino.placement(tmp_path / "trace.json", warm_runs=3)
    assert (first.type, first.provider, first.calls, first.ms, first.share) == ("FullyConnected", "CPU", 2, 0.09, 0.9)
    assert (second.type, second.ms) == ("Softmax", 0.01)


@pytest.fixture
def runtime() -> None:
    pytest.importorskip("openvino")


@pytest.mark.device
@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("shapes", ["dynamic", "static"])
def test_a_model_is_profiled_from_end_to_end(model: Path, shapes: str) -> None:
    result = profile(model, target(shapes=shapes), batch=64, per_operator=True, settings=QUICK)
    assert result.measurement.kind == "measured"
    assert result.measurement.n == len(result.samples[0].ms) >= 120
    assert result.samples[0].facts["runtime"].startswith("openvino ")
    assert {row.type: row.provider for row in result.operators} == {"FullyConnected": "CPU", "Softmax": "CPU"}
    assert sum(row.share or 0 for row in result.operators) == pytest.approx(1.0)


@pytest.mark.device
@pytest.mark.usefixtures("runtime")
def test_both_runtimes_are_measured_by_the_same_worker(model: Path) -> None:
    assert set(DEVICES) >= {"onnxruntime", "openvino"}
    rows = trace_operators(Subject(name="m", path=model), target=target(), runs=20)
    assert all(row.calls == 1 for row in rows)
    (samples,) = measure([Subject(name="m", path=model)], target=target(runtime="onnxruntime"), settings=QUICK)
    assert samples.facts["runtime"].startswith("onnxruntime ")


@pytest.mark.device
@pytest.mark.usefixtures("runtime")
def test_what_openvino_cannot_do_is_one_line(model: Path, tmp_path: Path) -> None:
    def refused(message: str, feeds: Path | None = None, **changes: Any) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            measure([Subject(name="m", path=model, feeds=feeds)], target=target(**changes), settings=QUICK)
        assert "\n" not in str(caught.value)

    refused(
        r"OpenVINO cannot load .*tiny\.onnx: NotFound: Unsupported property NO_SUCH",
        options={"config": {"NO_SUCH": "1"}},
    )
    np.savez(tmp_path / "feeds.npz", x=np.ones((1, 512)))
    refused("the input x is float32, got float64", tmp_path / "feeds.npz")
    np.savez(tmp_path / "feeds.npz", q=np.ones((1, 512), np.float32))
    refused("no values for the input x", tmp_path / "feeds.npz")
    np.savez(tmp_path / "feeds.npz", x=np.ones((1, 513), np.float32))
    refused(r"OpenVINO cannot run .* on x \[1, 513\]", tmp_path / "feeds.npz")
    broken = onnx.load(str(model))
    broken.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(broken, str(model))
    refused("OpenVINO cannot load .*NoSuchOperator")


@pytest.mark.device
@pytest.mark.usefixtures("runtime")
def test_a_precision_that_was_not_taken_is_an_error(model: Path) -> None:
    import openvino as package

    core, taken = package.Core(), {}
    for precision in ("bf16", "f16"):
        compiled = core.compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": precision})
        taken[precision] = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    for precision, got in taken.items():
        chosen = target(options={"precision": precision})
        if got == precision:
            measure([Subject(name="m", path=model)], target=chosen, settings=QUICK)
        else:
            with pytest.raises(ModelError, match=rf"OpenVINO could not use {precision} \(it took {got}\)"):
                measure([Subject(name="m", path=model)], target=chosen, settings=QUICK)
