from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import devices
from edgekd.devices import Estimate, Operator
from edgekd.errors import ModelError, TargetError
from edgekd.latency import profile
from edgekd.target import Target

CAVEAT = "Not an accurate representation of real performance."


class Compiler:
    """A vendor's compiler that needs 2 ms for every model named `large…`, and 0.5 ms for any other."""

    def unavailable(self, target: Target) -> str | None:
        return None

    def compile(self, target: Target, model: Path, folder: Path, *, timeout: float) -> Estimate:
        binary = folder / "model.bin"
        binary.write_bytes(b"compiled")
        return Estimate(
            ms=2.0 if model.stem.startswith("large") else 0.5, low_ms=0.4, high_ms=0.6, cycles=1000.0, files=(binary,),
            operators=(Operator("Conv", "NPU", 3, None, None), Operator("Gather", "CPU", 1, None, None)),
            figures={"exec us": 500.0}, options={"soc": "77", "version": "1.2"}, caveat=CAVEAT, notes=("one on CPU",),
        )  # fmt: skip


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setitem(devices.COMPILERS, "ethos-u", Compiler())
    return Target(
        name="npu", title="t", runtime="ethos-u", device="npu", precisions=("int8",), shapes="static", threads=1
    )


def test_an_estimate_is_one_figure_named_for_what_it_is(static_model: Path, npu: Target) -> None:
    result = profile(static_model, npu, batches=(1, 2))
    facts = result.measurement
    assert (facts.kind, facts.p50_ms, facts.batch, facts.sequence) == ("vendor_estimate", 0.5, 1, 16)
    assert (facts.p95_ms, facts.ci95_ms, facts.mean_ms, facts.n) == (None, None, None, 0)
    assert facts.notes == (CAVEAT, "one on CPU")
    assert result.samples == result.all_samples() == ()
    assert [row.type for row in result.fallback] == ["Gather"]
    assert "Gather ×1 on CPU" in result.fallback_problem()
    document = result.to_dict()
    assert document["estimate"]["caveat"] == CAVEAT
    assert document["estimate"]["options"] == {"soc": "77", "version": "1.2"}
    assert document["estimate"]["files"] == []
    assert document["latency"][0]["p95_ms"] is None
    assert [row["node_share"] for row in document["placement"]] == [0.75, 0.25]
    assert all("compiles a model for one size" in row["reason"] for row in document["batches"])


@pytest.mark.parametrize(("budget", "status"), [(0.6, "pass"), (0.4, "fail")])
def test_a_budget_is_compared_with_the_estimate_and_says_so(
    static_model: Path, npu: Target, budget: float, status: str
) -> None:
    verdict = profile(static_model, npu, latency_p95_ms=budget).verdict
    assert verdict is not None
    assert verdict.status == status
    assert "the vendor estimate of 0.5 ms" in verdict.reason
    assert "no interval" in verdict.reason


def test_two_estimates_of_one_target_have_a_ratio_without_interval(static_model: Path, npu: Target) -> None:
    large = static_model.with_name("large.onnx")
    large.write_bytes(static_model.read_bytes())
    result = profile(static_model, npu, baseline=large, speedup=3.0, tell_apart=True)
    assert result.measurement.speedup == 4.0
    assert result.verdict is not None
    assert result.verdict.status == "pass"
    assert result.comparison is not None
    assert result.comparison.a_measurement.p50_ms == 2.0
    assert result.comparison.conclusion == "B is 4× faster than A (vendor estimate, no interval)"


def test_what_was_compiled_is_kept_where_asked(static_model: Path, npu: Target, tmp_path: Path) -> None:
    result = profile(static_model, npu, out=tmp_path / "kept")
    assert (tmp_path / "kept" / "model.bin").read_bytes() == b"compiled"
    assert result.to_dict()["estimate"]["files"] == ["model.bin"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TargetError, match="cannot keep the compiled model"):
        profile(static_model, npu, out=tmp_path / "file" / "kept")
    with pytest.raises(TargetError, match="--out would have no effect.*no compiled model to keep"):
        profile(static_model, "local", out=tmp_path / "kept")


def test_what_would_have_no_effect_is_refused(static_model: Path, npu: Target) -> None:
    with pytest.raises(TargetError, match="--batch, --threads would have no effect: target 'npu' is compiled for"):
        profile(static_model, npu, batch=4, threads=2)
    other = Target(name="ov", title="t", runtime="openvino", device="cpu", precisions=("fp32",))
    with pytest.raises(TargetError, match="--session would have no effect: target 'ov' runs models with openvino"):
        profile(static_model, other, session={"graph_optimization": "basic"})


def test_free_dimensions_are_refused_with_what_to_do(text_model: Path, npu: Target) -> None:
    with pytest.raises(
        ModelError, match=r"input_ids: batch_size.*needs fixed ones.*edgekd export STUDENT --target npu"
    ):
        profile(text_model, npu)
