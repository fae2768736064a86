from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.devices import COMPILERS, compiler_of, qualcomm
from edgekd.errors import ModelError, StageError, TargetError
from edgekd.target import Target

# Made like a profile of onnxruntime-qnn 2.7.0, with other numbers.
HEADER = "Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier"
PROFILE = f"""{HEADER}
0,FINALIZE,1000,US,BACKEND,ROOT,QNN (finalize) time
0,BACKEND,0,US,BACKEND,ROOT,Performance Estimates
0,BACKEND,0,US,BACKEND,SUB-EVENT,Mode
0,BACKEND,3000,CYCLES,BACKEND,SUB-EVENT,Simulated (Accelerator exec cycles)
0,BACKEND,2500,CYCLES,BACKEND,SUB-EVENT,Simulated (Accelerator exec cycles (lower estimate))
0,BACKEND,3500,CYCLES,BACKEND,SUB-EVENT,Simulated (Accelerator exec cycles (upper estimate))
0,BACKEND,200,US,BACKEND,SUB-EVENT,Simulated (Accelerator exec time us)
0,BACKEND,150,US,BACKEND,SUB-EVENT,Simulated (Accelerator exec time us (lower estimate))
0,BACKEND,250,US,BACKEND,SUB-EVENT,Simulated (Accelerator exec time us (upper estimate))
0,BACKEND,64,BYTES,BACKEND,SUB-EVENT,Input Fill
0,BACKEND,0,US,BACKEND,SUB-EVENT,Missing Ops (Number of Ops with no Costs associated)
"""
REFUSED = (
    "\x1b[1;31m2026-01-01 [E:onnxruntime:, x.cc:1 GetCapabilityImpl] Unsupported nodes in QNN EP: "
    "{ name: /a/Erf, type: Erf }{ name: /b/Erf, type: Erf }{ name: f_1, type: QNNExecutionProvider_f_1 }\x1b[m\n"
)
FALLBACK = "Fail: nodes are assigned to the default CPU EP, but fallback to CPU EP has been explicitly disabled"


def target_of(**options: object) -> Target:
    return Target(
        name="npu", title="NPU", runtime="qualcomm", device="npu", precisions=("int8",), shapes="static",
        options={"soc": "77", **options},
    )  # fmt: skip


def model_of(path: Path, kinds: tuple[str, ...] = ("Relu",), shape: tuple[int | str, ...] = (1, 8)) -> Path:
    values = ["x", *(f"v{i}" for i in range(len(kinds) - 1)), "y"]
    nodes = [helper.make_node(kind, [values[i]], [values[i + 1]], f"node{i}") for i, kind in enumerate(kinds)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch):
    """A vendor's compiler that is told what to do; the requests it got are kept."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    seen: list[dict] = []

    def behave(
        profile: str = PROFILE, *, error: str = "", stderr: str = "", code: int = 0, files: int = 2
    ) -> list[dict]:
        def run(command, **keywords):
            request = json.loads(Path(command[2]).read_text())
            seen.append(request)
            context = Path(request["session"]["ep.context_file_path"])
            assert not Path(request["provider"]["profiling_file_path"]).exists()
            for file in (context, context.with_name(f"{context.stem}_qnn.bin"))[:files]:
                file.write_bytes(b"compiled")
            Path(request["provider"]["profiling_file_path"]).write_text(profile)
            if code == 0:
                Path(request["result"]).write_text(json.dumps({"versions": {"onnxruntime-qnn": "9"}, "error": error}))
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return seen

    return behave


def test_the_estimate_is_the_vendors_with_its_bounds_and_everything_it_depends_on(vendor, tmp_path: Path) -> None:
    requests = vendor()
    model = model_of(tmp_path / "model.onnx")
    target = target_of(provider_options={"htp_graph_finalization_optimization_mode": "3", "vtcm_mb": "8"})
    (tmp_path / "out").mkdir()
    estimate = qualcomm.compile(target, model, tmp_path / "out", timeout=9)
    assert (estimate.ms, estimate.low_ms, estimate.high_ms, estimate.cycles) == (0.2, 0.15, 0.25, 3000)
    assert [file.name for file in estimate.files] == ["model_ctx.onnx", "model_ctx_qnn.bin"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in estimate.files}
    assert estimate.options["soc_model"] == "77"
    assert estimate.options["htp_graph_finalization_optimization_mode"] == "3"
    assert estimate.options["vtcm_mb"] == "8"
    assert estimate.options["onnxruntime-qnn"] == "9"
    assert not any("/" in value for value in estimate.options.values())  # no paths of this machine
    assert "No device was run" in estimate.caveat
    assert [(row.type, row.calls, row.ms) for row in estimate.operators] == [("Relu", 1, None)]
    assert requests[0]["session"]["session.disable_cpu_ep_fallback"] == "1"
    assert requests[0]["session"]["ep.context_embed_mode"] == "0"


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"profile": PROFILE.replace("0,US,BACKEND,SUB-EVENT,Missing", "2,US,BACKEND,SUB-EVENT,Missing")},
         ModelError, r"no costs for 2 operators of .*model\.onnx \(Missing Ops\)"),
        ({"profile": "\n".join(PROFILE.splitlines()[:-1])}, ModelError, "does not say how many operators"),
        ({"profile": PROFILE + "\n".join(PROFILE.splitlines()[1:])}, ModelError, "split the model into several graphs"),
        ({"profile": HEADER + "\n0,FINALIZE,9,US,BACKEND,ROOT,QNN (finalize) time\n"}, TargetError, "no estimate"),
        ({"profile": "nonsense"}, StageError, "expected a profile of QNN, got 'nonsense'"),
        ({"files": 1}, StageError, "wrote no context binary"),
        ({"error": FALLBACK, "stderr": REFUSED}, ModelError, r"does not run all of .*: Erf \(/a/Erf, /b/Erf\); lower"),
        ({"error": FALLBACK}, ModelError, "does not run all of .*: Relu; lower"),
        ({"error": FALLBACK, "stderr": "GetCapability() failed with error: QNN_DEVICE_ERROR_INVALID_CONFIG"},
         TargetError, "refuses the target's options"),
        ({"error": "RuntimeError: no", "stderr": "why"}, ModelError, "refuses .*model.onnx: RuntimeError: no\n  why"),
        ({"code": -6, "stderr": "assertion"}, ModelError, r"crashed \(exit code -6\) on .*model.onnx\n  assertion"),
    ],
)  # fmt: skip
def test_what_is_no_estimate_of_the_whole_model_is_refused_and_leaves_nothing(
    vendor, tmp_path: Path, told: dict, error: type[Exception], message: str
) -> None:
    vendor(**told)
    model = model_of(tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=f"(?s){message}"):
        qualcomm.compile(target_of(), model, tmp_path / "out", timeout=9)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_compiler_that_does_not_come_back_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(qualcomm, "WORKER", tmp_path / "slow.py")
    (tmp_path / "out").mkdir()
    with pytest.raises(TargetError, match="longer than 1 s"):
        qualcomm.compile(target_of(), model_of(tmp_path / "model.onnx"), tmp_path / "out", timeout=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_free_dimensions_and_files_that_are_no_model_are_refused_before_anything_runs(vendor, tmp_path: Path) -> None:
    requests = vendor()
    with pytest.raises(ModelError, match=r"needs static shapes: x \[batch, 8\]"):
        qualcomm.compile(target_of(), model_of(tmp_path / "m.onnx", shape=("batch", 8)), tmp_path, timeout=9)
    (tmp_path / "bad.onnx").write_text("no")
    with pytest.raises(ModelError, match="is not an ONNX model"):
        qualcomm.compile(target_of(), tmp_path / "bad.onnx", tmp_path, timeout=9)
    assert requests == []


def test_a_chip_without_estimates_has_a_reason_but_can_be_compiled_for(vendor, tmp_path: Path) -> None:
    vendor(HEADER + "\n0,FINALIZE,9,US,BACKEND,ROOT,QNN (finalize) time\n")
    phone = target_of(soc="69")
    assert "prints no estimate for soc 69 (it does for 52, " in str(qualcomm.unavailable(phone))
    model = model_of(tmp_path / "model.onnx")
    with pytest.raises(TargetError, match="no estimate for soc 69"):
        qualcomm.compile(phone, model, tmp_path, timeout=9)
    made = qualcomm.build(phone, model, tmp_path, timeout=9)
    assert made.figures == {}
    assert all(file.is_file() for file in made.files)


def test_options_that_are_set_here_are_not_the_targets(vendor, tmp_path: Path) -> None:
    vendor()
    target = target_of(provider_options={"backend_path": "x.so"})
    with pytest.raises(TargetError, match="provider_options may not set backend_path"):
        qualcomm.compile(target, model_of(tmp_path / "m.onnx"), tmp_path, timeout=9)


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMPILERS["qualcomm"] is compiler_of(target_of())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert qualcomm.unavailable(target_of()) == "onnxruntime-qnn is not installed: pip install 'edgekd[qualcomm]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert qualcomm.unavailable(target_of(soc="")) == "the target's options name no soc"
    assert qualcomm.unavailable(target_of()) is None


# With the vendor's compiler.


@pytest.fixture(scope="module")
def bert(make_model, tmp_path_factory) -> Path:
    from edgekd.export.lower import calibrate, lower
    from edgekd.export.onnx import export_float
    from edgekd.student import load_student

    folder = tmp_path_factory.mktemp("qualcomm")
    student = load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")
    graph = export_float(student, "text-classification", folder / "float.onnx")
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 40, (2, 12))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    for form in ("int8_qdq", "int16_qdq"):
        ranges = calibrate(graph, [feeds], operators=None)
        lower(graph, folder / f"{form}.onnx", form, ranges=ranges, model_type="bert", batch=1, sequence=16)
    return folder


@pytest.mark.device
@pytest.mark.parametrize(("form", "soc"), [("int8_qdq", "77"), ("int8_qdq", "72"), ("int16_qdq", "77")])
def test_a_bert_compiles_as_a_whole_and_twice_alike(bert: Path, tmp_path: Path, form: str, soc: str) -> None:
    pytest.importorskip("onnxruntime_qnn")
    made = [
        qualcomm.compile(target_of(soc=soc), bert / f"{form}.onnx", folder, timeout=300)
        for folder in (tmp_path / "a", tmp_path / "b")
        if folder.mkdir() is None
    ]
    assert made[0].figures == made[1].figures
    first = made[0]
    assert first.low_ms is not None
    assert first.high_ms is not None
    assert 0 < first.low_ms <= first.ms <= first.high_ms
    assert first.cycles
    assert {file.suffix for file in first.files} == {".onnx", ".bin"}
    assert {node.op_type for node in onnx.load(first.files[0]).graph.node} == {"EPContext"}


@pytest.mark.device
@pytest.mark.parametrize(("kinds", "message"), [(("Relu", "Erf"), r"Erf \(node1\)"), (("Erf",), "Erf;")])
def test_an_operator_that_would_fall_back_to_the_cpu_is_named(tmp_path: Path, kinds, message: str) -> None:
    pytest.importorskip("onnxruntime_qnn")
    model = model_of(tmp_path / "model.onnx", kinds)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=f"QNN does not run all of .*{message}"):
        qualcomm.compile(target_of(), model, tmp_path / "out", timeout=300)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.device
def test_operators_without_costs_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    with pytest.raises(ModelError, match=r"no costs for 1 operators"):
        qualcomm.compile(target_of(), model_of(tmp_path / "model.onnx", ("Elu",)), tmp_path, timeout=300)


@pytest.mark.device
def test_a_chip_qnn_does_not_know_is_the_targets_mistake(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    with pytest.raises(TargetError, match="refuses the target's options"):
        qualcomm.build(target_of(soc="1000"), model_of(tmp_path / "model.onnx"), tmp_path, timeout=300)
