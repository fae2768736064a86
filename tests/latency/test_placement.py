from __future__ import annotations

import pytest

from edgekd import devices
from edgekd.devices import Operator
from edgekd.latency.placement import explain, fallbacks, overlaps, shares, wanted
from edgekd.target import Target

CUDA, RT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


def target(**more: object) -> Target:
    known = {"name": "t", "title": "t", "runtime": "onnxruntime", "device": "gpu", "precisions": ("fp32",)}
    return Target(**{**known, **more})  # type: ignore[arg-type]


def test_shares_add_up_and_the_busiest_provider_comes_first() -> None:
    rows = [
        Operator("Gather", CPU, 1, 0.2, 0.1),
        Operator("MatMul", CUDA, 6, 1.6, 0.8),
        Operator("Add", CUDA, 1, 0.2, 0.1),
    ]
    gpu, cpu = shares(rows)
    assert (gpu.provider, gpu.nodes, gpu.node_share, gpu.time_share) == (CUDA, 7, 7 / 8, pytest.approx(0.9))
    assert (cpu.provider, cpu.node_share, cpu.time_share) == (CPU, 1 / 8, 0.1)
    assert shares([]) == ()


def test_a_compiler_that_does_not_time_gives_no_share_of_time() -> None:
    npu, cpu = shares([Operator("Conv", "NPU", 9, None, None), Operator("Gather", "CPU", 1, None, None)])
    assert (npu.time_share, cpu.time_share) == (None, None)
    assert npu.node_share == 0.9


@pytest.mark.parametrize(
    ("providers", "fallen"), [((CUDA, CPU), ["Gather"]), ((RT, CUDA, CPU), ["Gather", "MatMul"]), ((CPU,), ["MatMul"])]
)
def test_what_is_not_on_the_first_provider_fell_back(providers: tuple[str, ...], fallen: list[str]) -> None:
    rows = [Operator("Gather", CPU, 2, 0.1, 0.1), Operator("MatMul", CUDA, 1, 0.9, 0.9)]
    asked = target(providers=providers)
    assert [row.type for row in fallbacks(rows, asked)] == fallen
    said = explain(fallbacks(rows, asked), wanted(asked))
    assert providers[0] in said
    assert all(name in said for name in fallen)


def test_on_a_compiler_and_another_runtime_the_cpu_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Operator("Conv", "NPU", 9, None, None), Operator("Gather", "CPU", 1, None, None)]
    npu = target(runtime="ethos-u", device="npu")
    monkeypatch.setitem(devices.COMPILERS, "ethos-u", object())  # type: ignore[arg-type]
    assert [row.type for row in fallbacks(rows, npu)] == ["Gather"]
    assert wanted(npu) == "the NPU"
    assert fallbacks(rows, target(runtime="openvino", device="cpu")) == ()
    assert [row.type for row in fallbacks(rows, target(runtime="openvino", device="gpu"))] == ["Gather"]


def test_operators_that_hold_others_are_told() -> None:
    (said,) = overlaps([Operator("If", CPU, 1, 1.0, 0.5), Operator("Add", CPU, 1, 1.0, 0.5)])
    assert "time of If contains" in said
    assert overlaps([Operator("Add", CPU, 1, 1.0, 1.0)]) == ()
