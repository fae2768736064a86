"""Targets that are not measured here: built in their form, checked, and honest about their latency."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml
from click.testing import CliRunner

import edgekd
from edgekd import devices
from edgekd.cli import main
from edgekd.constraints import budget_of
from edgekd.context import Budget
from edgekd.data import DataSpec
from edgekd.devices import Estimate
from edgekd.errors import DataError, ModelError, RecipeError, TargetError
from edgekd.latency.verdict import FAIL, PASS
from edgekd.pipeline import compress, evaluate
from edgekd.pipeline.export import export
from edgekd.quantize.ptq import Candidate, choose
from edgekd.target import Target, load_target, probe, shipped_targets_dir

PRUNE = {"prune": {"layers": [0, 2], "heads": 2, "neurons": [40, 24], "samples": 32}}
BUDGET = {"size_mb": 100, "sequence": 12}
CAVEAT = "the vendor says: do not trust this"


class FakeCompiler:
    """A compiler that states 2 ms for each thousand bytes, and writes a file for the device."""

    def __init__(self) -> None:
        self.compiled: list[Path] = []

    def unavailable(self, target: Target) -> str | None:
        return None

    def compile(self, target: Target, model: Path, folder: Path, *, timeout: float) -> Estimate:
        self.compiled.append(model)
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / "model.bin"
        made.write_bytes(b"for the device")
        ms = 2e-3 * model.stat().st_size
        return Estimate(ms=ms, files=(made,), caveat=CAVEAT, figures={"cycles": 7.0}, options={"soc": "77"})


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setitem(devices.COMPILERS, "qualcomm", fake)
    return fake


def shapes_of(file: Path) -> dict[str, list[object]]:
    return {value.name: value.shape for value in ort.InferenceSession(str(file)).get_inputs()}


def operators_of(file: Path) -> set[str]:
    return {node.op_type for node in onnx.load(file).graph.node}


def test_a_gpu_that_is_not_there_gets_fp16_that_says_the_same_on_the_cpu(make_recipe, tmp_path):
    result = compress(make_recipe(targets=["gpu-cuda"], stages=[PRUNE], budget=BUDGET), tmp_path / "run")
    manifest = result.manifests["gpu-cuda"]
    artifact, [latency] = manifest["artifact"], manifest["latency"]
    assert (artifact["lowering"], artifact["precision"]) == ("fp16", "fp16")
    assert artifact["parity"]["shipped"]["agreement"] >= 0.98
    assert latency["kind"] == "unavailable"
    assert latency["p50_ms"] is None
    assert "CUDAExecutionProvider" in latency["reason"]
    assert manifest["verdict"][0]["status"] == PASS
    assert "latency not measured" in manifest["verdict"][0]["reason"]
    assert "size" in manifest["verdict"][0]["reason"]
    assert [entry["latency"]["kind"] for entry in manifest["ledger"]] == ["unavailable"]
    assert manifest["ledger"][0]["metric"] is not None
    assert result.exit_code == 0
    file = result.bundles["gpu-cuda"] / "onnx" / "model.onnx"
    kinds = {tensor.data_type for tensor in onnx.load(file).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert shapes_of(file)["input_ids"] == ["batch_size", "sequence_length"]


@pytest.fixture(scope="module")
def orin(make_recipe, tmp_path_factory):
    """A finished run for a board that is not there; the texts of its data are partly longer than its shape."""
    recipe = make_recipe(
        targets=["gpu-jetson-orin"], stages=[PRUNE, {"quantize": {}}], budget={**BUDGET, "sequence": 8}
    )
    return compress(recipe, tmp_path_factory.mktemp("orin") / "run")


def test_a_board_that_is_not_there_gets_symmetric_qdq_in_its_shapes(orin):
    manifest = orin.manifests["gpu-jetson-orin"]
    file = orin.bundles["gpu-jetson-orin"] / "onnx" / "model.onnx"
    assert manifest["artifact"]["lowering"] == "int8_qdq"
    assert manifest["artifact"]["fixed"] == {"batch": 1, "sequence": 8}
    assert shapes_of(file)["input_ids"] == [1, 8]
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators_of(file)
    assert not operators_of(file) & set(load_target("gpu-jetson-orin").unsupported_operators)
    graph = onnx.load(file).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zero_points = [values[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert zero_points
    assert all((zero == 0).all() and zero.dtype == np.int8 for zero in zero_points)


def test_forms_of_an_unmeasured_target_are_chosen_by_its_order(orin):
    [quantize] = [entry for entry in orin.manifests["gpu-jetson-orin"]["ledger"] if entry["stage"] == "quantize"]
    assert [each["lowering"] for each in quantize["details"]["candidates"]] == ["int8_qdq", "fp16"]
    assert all(each["p50_ms"] is None for each in quantize["details"]["candidates"])
    assert "by the target's preference" in quantize["details"]["not_measured"]


def test_what_is_shipped_with_fixed_shapes_is_scored_in_them(orin, text_data):
    bundle = orin.bundles["gpu-jetson-orin"]
    seen = evaluate(bundle, DataSpec(path=str(text_data)))
    stated = orin.manifests["gpu-jetson-orin"]["quality"]
    assert (seen["value"], seen["n"]) == (stated["value"], stated["n"])


def test_the_card_of_a_fixed_bundle_says_how_to_run_it(orin):
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    bundle = orin.bundles["gpu-jetson-orin"]
    card = (bundle / "README.md").read_text()
    assert "fixed to batch 1, 8 tokens" in card
    assert "## How the latency is known" in card
    assert "is not known: this machine is not the target's board" in card
    assert 'padding="max_length", truncation=True, max_length=8' in card
    assert "at the stated speed" not in card
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ORTModelForSequenceClassification.from_pretrained(bundle)
        classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(bundle))
        [answer] = classify("word1 good", padding="max_length", truncation=True, max_length=8)
    assert answer["label"] in ("negative", "positive")


def test_a_sequence_longer_than_the_model_takes_is_refused(make_recipe, tmp_path):
    recipe = make_recipe(targets=["gpu-jetson-orin"], stages=[PRUNE], budget={**BUDGET, "sequence": 33})
    with pytest.raises(RecipeError, match=r"budget\.sequence is 33(?s:.)*expected 1 to 32, the most this model takes"):
        compress(recipe, tmp_path / "run")


def test_an_operator_the_target_does_not_run_is_named(make_recipe, tmp_path):
    facts = yaml.safe_load((shipped_targets_dir() / "gpu-cuda.yaml").read_text())
    facts["unsupported_operators"] = ["Softmax"]
    facts.pop("sources")
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(facts))
    recipe = make_recipe(targets=[str(tmp_path / "odd.yaml")], stages=[PRUNE], budget=BUDGET)
    with pytest.raises(ModelError, match=r"the fp16 graph does not suit odd: odd does not run Softmax"):
        compress(recipe, tmp_path / "run")


def test_an_estimate_is_called_one_and_its_files_ship(make_recipe, compiler, tmp_path):
    stages = [PRUNE, {"quantize": {"lowering": "int8_qdq"}}]
    recipe = make_recipe(
        targets=["npu-qualcomm-qcs9100"], stages=stages, budget={"speedup": 1.05, "size_mb": 100, "sequence": 12}
    )
    result = compress(recipe, tmp_path / "run")
    manifest, bundle = result.manifests["npu-qualcomm-qcs9100"], result.bundles["npu-qualcomm-qcs9100"]
    [latency] = manifest["latency"]
    own = manifest["artifact"]["size_bytes"]
    assert latency["kind"] == "vendor_estimate"
    assert latency["p50_ms"] == pytest.approx(2e-3 * own, rel=1e-4)
    assert latency["p95_ms"] is None
    assert latency["speedup"] == pytest.approx(latency["teacher_p50_ms"] / latency["p50_ms"], rel=1e-3)
    assert latency["speedup"] > 1.05
    assert CAVEAT in latency["notes"]
    assert "the teacher was compiled in the same form (int8_qdq)" in latency["notes"][-1]
    assert (latency["batch"], latency["sequence"]) == (1, 12)
    assert len(compiler.compiled) == 4, "the teacher and the student for the ledger, and both for the result"
    prune, quantize = manifest["ledger"]
    assert [prune[side]["latency"]["kind"] for side in ("before", "after")] == ["vendor_estimate"] * 2
    assert prune["after"]["latency"]["ratio"] == pytest.approx(
        prune["after"]["size_bytes"] / prune["before"]["size_bytes"], rel=1e-3
    )
    assert "ratio_ci99" not in prune["after"]["latency"], "one figure has no interval"
    assert prune["kept"]
    assert "(vendor estimate, no interval)" in prune["why"]
    assert quantize["kept"]
    assert "runs no float form" in quantize["why"]
    assert manifest["estimate"]["artifact"]["options"] == {"soc": "77"}
    assert manifest["estimate"]["teacher"]["ms"] == pytest.approx(latency["teacher_p50_ms"], rel=1e-4)
    assert manifest["artifact"]["device"] == ["device/model.bin"]
    assert (bundle / "device" / "model.bin").read_bytes() == b"for the device"
    assert "device/model.bin" in json.loads((bundle / "edgekd.json").read_text())["files"]
    assert "vendor estimate" in manifest["verdict"][0]["reason"]
    assert manifest["verdict"][0]["status"] == PASS
    card = (bundle / "README.md").read_text()
    assert f"- {CAVEAT}" in card
    assert "`device/model.bin` was made by the vendor's compiler" in card


def test_a_teacher_that_does_not_compile_costs_only_the_speedup(make_recipe, compiler, tmp_path, monkeypatch):
    whole = compiler.compile

    def refuse(target, model, folder, *, timeout):
        if model.parent.name == "teacher":
            raise ModelError("the compiler refuses Gelu")
        return whole(target, model, folder, timeout=timeout)

    monkeypatch.setattr(compiler, "compile", refuse)
    stages = [{"quantize": {"lowering": "int8_qdq"}}]
    result = compress(make_recipe(targets=["npu-qualcomm-qcs9100"], stages=stages, budget=BUDGET), tmp_path / "run")
    [latency] = result.manifests["npu-qualcomm-qcs9100"]["latency"]
    assert latency["p50_ms"] > 0
    assert latency["speedup"] is None
    assert "no speedup is known: the teacher as int8_qdq: the compiler refuses Gelu" in latency["notes"][-1]
    assert set(result.manifests["npu-qualcomm-qcs9100"]["estimate"]) == {"artifact"}


def test_an_estimate_over_the_budget_fails(make_recipe, compiler, tmp_path):
    recipe = make_recipe(
        targets=["npu-qualcomm-sa8797"],
        stages=[{"quantize": {"lowering": "int8_qdq"}}],
        budget={"latency_p95_ms": 0.001, "sequence": 12},
    )
    result = compress(recipe, tmp_path / "run")
    assert result.verdicts[0].status == FAIL
    assert "vendor estimate" in result.verdicts[0].reason
    assert result.exit_code == 3


@pytest.mark.skipif(find_spec("onnxruntime_qnn") is not None, reason="the compiler is installed here")
def test_without_the_compiler_the_artifact_is_built_and_the_package_named(make_recipe, tmp_path):
    stages = [{"quantize": {"lowering": "int8_qdq"}}]
    recipe = make_recipe(targets=["npu-qualcomm-qcs9100"], stages=stages, budget=BUDGET)
    result = compress(recipe, tmp_path / "run")
    manifest = result.manifests["npu-qualcomm-qcs9100"]
    assert manifest["latency"][0]["kind"] == "unavailable"
    assert "pip install 'edgekd[qualcomm]'" in manifest["latency"][0]["reason"]
    assert "estimate" not in manifest
    assert "device" not in manifest["artifact"]
    file = result.bundles["npu-qualcomm-qcs9100"] / "onnx" / "model.onnx"
    assert shapes_of(file)["input_ids"] == [1, 12]
    assert "QuantizeLinear" in operators_of(file)
    with pytest.raises(RecipeError, match=r"cannot be judged(?s:.)*pip install 'edgekd\[qualcomm\]'; give size_mb"):
        make_recipe(targets=["npu-qualcomm-qcs9100"], stages=stages, budget={"speedup": 2})


def test_commands_refuse_what_the_target_does_not_run(make_model, text_data, tmp_path):
    arguments = [
        str(make_model("bert")),
        "--data",
        str(text_data),
        "--target",
        "gpu-cuda",
        "--out",
        str(tmp_path / "q"),
    ]
    quantize = CliRunner().invoke(main, ["quantize", *arguments, "--set", "lowering=int8_qdq"])
    assert quantize.exit_code == 2
    assert "target gpu-cuda needs fp16 or fp32; your recipe asks quantize.lowering: int8_qdq" in quantize.stderr
    arguments[4] = "npu-ethos-u55-256"
    exported = CliRunner().invoke(main, ["export", *arguments, "--batch", "2"])
    assert exported.exit_code == 2
    assert "takes at most 1 example(s) at once; got 2" in exported.stderr


def test_a_quantized_folder_for_an_npu_keeps_its_ranges_for_export(make_model, text_data, compiler, tmp_path):
    folder = str(tmp_path / "quantized")
    arguments = ["--target", "npu-qualcomm-qcs9100", "--sequence", "12", "--json"]
    quantize = ["quantize", str(make_model("bert")), "--data", str(text_data), "--set", "lowering=int8_qdq"]
    made = CliRunner().invoke(main, [*quantize, *arguments, "--out", folder])
    assert made.exit_code == 0, made.stderr
    done = CliRunner().invoke(main, ["export", folder, *arguments, "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["artifact"]["lowering"] == "int8_qdq"
    assert manifest["artifact"]["fixed"] == {"batch": 1, "sequence": 12}


def test_export_takes_the_form_of_the_target_and_calibrates_on_the_data(make_model, compiler, text_data, tmp_path):
    target = probe(load_target("npu-qualcomm-qcs9100"))
    budget, data = Budget(sequence=12), DataSpec(path=str(text_data))
    manifest = export(make_model("bert"), tmp_path / "b", target=target, budget=budget, data=data)
    assert manifest["artifact"]["lowering"] == "int8_qdq"
    assert manifest["latency"][0]["kind"] == "vendor_estimate"
    assert manifest["latency"][0]["speedup"] is None
    assert manifest["quality"]["n"] == 40
    assert set(manifest["estimate"]) == {"artifact"}
    with pytest.raises(DataError, match="found on examples: give --data"):
        export(make_model("bert"), tmp_path / "c", target=target, budget=budget)


def test_export_for_a_gpu_that_is_not_there_needs_no_data(make_model, tmp_path):
    target = probe(load_target("gpu-jetson-orin"))
    manifest = export(make_model("vit"), tmp_path / "b", target=target, budget=budget_of(target, {}))
    assert manifest["artifact"]["lowering"] == "fp16"
    assert manifest["artifact"]["fixed"] == {"batch": 1}
    assert manifest["latency"][0]["kind"] == "unavailable"
    assert shapes_of(tmp_path / "b" / "onnx" / "model.onnx")["pixel_values"] == [1, 1, 8, 8]


def test_a_student_in_a_form_of_another_target_is_not_exported(finished, tmp_path):
    student = finished.folder / "03-quantize"
    with pytest.raises(TargetError, match=r"quantized to int8_dynamic, which target gpu-cuda does not run"):
        export(student, tmp_path / "b", target=probe(load_target("gpu-cuda")), budget=Budget(sequence=12))


def test_the_choice_among_forms_is_by_time_or_by_order():
    forms = [Candidate("a", Path("a"), 0.90), Candidate("b", Path("b"), 0.95)]
    assert choose(forms, 0.90, 0.01).lowering == "a"
    assert choose(forms, 0.95, 0.01).lowering == "b"
    timed = [Candidate("a", Path("a"), 0.95, 2.0), Candidate("b", Path("b"), 0.95, 1.0)]
    assert choose(timed, 0.95, 0.01).lowering == "b"
    assert choose(timed, 0.99, 0.01).lowering == "b", "none is good: the best, then the fastest"


@pytest.mark.device
@pytest.mark.parametrize(
    ("target", "package", "file"),
    [
        ("npu-qualcomm-qcs9100", "onnxruntime_qnn", "onnx/model.onnx"),
        ("npu-ethos-u85-512", "litert_torch", "tflite/model.tflite"),
    ],
)
def test_npu_targets_go_from_teacher_to_estimate(make_recipe, text_data, tmp_path, target, package, file):
    pytest.importorskip(package)
    result = compress(make_recipe(targets=[target], stages=[PRUNE, {"quantize": {}}], budget=BUDGET), tmp_path / "run")
    manifest, bundle = result.manifests[target], result.bundles[target]
    [latency] = manifest["latency"]
    assert latency["kind"] == "vendor_estimate"
    assert latency["p50_ms"] > 0
    assert latency["teacher_p50_ms"] > 0
    assert latency["notes"]
    assert manifest["artifact"]["file"] == file
    assert (bundle / file).is_file()
    assert manifest["artifact"]["device"]
    assert all((bundle / name).stat().st_size for name in manifest["artifact"]["device"])
    assert manifest["artifact"]["parity"]["shipped"]["agreement"] >= 0.8
    assert manifest["estimate"]["artifact"]["options"]
    seen = evaluate(bundle, DataSpec(path=str(text_data)))
    assert seen["value"] == manifest["quality"]["value"]
    assert edgekd.load(result.folder / "02-quantize").quantization["lowering"] == manifest["artifact"]["lowering"]
