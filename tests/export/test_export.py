from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edgekd.data import Examples
from edgekd.errors import ModelError, RecipeError, StageError
from edgekd.export.bundle import assemble, read_manifest, seal
from edgekd.export.lower import LOWERINGS, calibrate, keep_residuals_apart, lower, operators_to_calibrate, precision_of
from edgekd.export.onnx import export_float, save_checked
from edgekd.export.parity import compare, onnx_logits, require_parity, torch_logits
from edgekd.quantize.forms import find_ranges
from edgekd.student import copy_processor, load_student
from edgekd.tasks import get_task

TASKS = {"Sequence": "text-classification", "Image": "image-classification"}


def student_of(make_model, kind: str):
    family = "Sequence" if kind in ("bert", "roberta", "electra", "distilbert") else "Image"
    return load_student(make_model(kind), auto_class=f"AutoModelFor{family}Classification"), TASKS[family]


def feeds_of(kind: str, names: set[str], rows: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    if "pixel_values" in names:
        return {"pixel_values": generator.normal(size=(rows, 1, 8, 8)).astype(np.float32)}
    mask = np.ones((rows, 12), np.int64)
    mask[1, 7:] = 0
    mask[2, :4] = 0
    values = {
        "input_ids": generator.integers(5, 40, (rows, 12)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((rows, 12), np.int64),
    }
    return {name: value for name, value in values.items() if name in names}


def unpadded(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ones_like(value) if name == "attention_mask" else value for name, value in feeds.items()}


def run(file, feeds):
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.fixture(scope="module")
def graphs(make_model, tmp_path_factory):
    """Kind to (student, float graph), exported once."""
    made = {}

    def make(kind: str):
        if kind not in made:
            student, task = student_of(make_model, kind)
            made[kind] = student, export_float(student, task, tmp_path_factory.mktemp(kind) / "model.onnx")
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "vit", "deit", "resnet"])
def test_every_lowering_says_what_torch_says(graphs, kind, tmp_path):
    student, graph = graphs(kind)
    names = {value.name for value in ort.InferenceSession(str(graph)).get_inputs()}
    feeds = feeds_of(kind, names)
    with torch.no_grad():
        expected = student.model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    feeds_seen = [feeds_of(kind, names, seed=seed) for seed in range(4)]
    static = calibrate(graph, feeds_seen)
    # The unpadded ones: the masks of full QDQ are made for ranges without padding.
    whole = calibrate(graph, [unpadded(feed) for feed in feeds_seen], operators=None)
    for name in LOWERINGS:
        ranges = static if operators_to_calibrate(name) else whole
        file = lower(graph, tmp_path / f"{name}.onnx", name, ranges=ranges, model_type=student.model.config.model_type)
        tolerance = 1e-4 if precision_of(name) == "fp32" else 0.25 * float(np.ptp(expected))
        assert np.abs(run(file, feeds) - expected).max() < tolerance, name
        if precision_of(name) == "int8":
            integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
            assert any(t.data_type in integers for t in onnx.load(file).graph.initializer)


def test_fused_graphs_have_fused_attention_and_no_add_that_would_be_fused_at_load(graphs, tmp_path):
    student, graph = graphs("bert")
    file = lower(graph, tmp_path / "fused.onnx", "fp32_fused", model_type="bert")
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("Attention") == len(student.arch.layers)
    assert keep_residuals_apart(onnx.load(file)) == 0
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    assert "SkipLayerNormalization" not in {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}


def test_images_have_their_size_in_the_graph(graphs):
    _, graph = graphs("vit")
    (value,) = onnx.load(graph).graph.input
    assert [dimension.dim_value for dimension in value.type.tensor_type.shape.dim] == [0, 1, 8, 8]


def test_a_model_with_a_single_token_type_is_not_asked_for_it(make_model, tmp_path):
    model = copy.deepcopy(load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification").model)
    embeddings = model.bert.embeddings
    embeddings.token_type_embeddings = torch.nn.Embedding.from_pretrained(embeddings.token_type_embeddings.weight[:1])
    model.config.type_vocab_size = 1
    model.save_pretrained(tmp_path / "one")
    copy_processor(make_model("bert"), tmp_path / "one")
    student = load_student(tmp_path / "one", auto_class="AutoModelForSequenceClassification")
    task = get_task("text-classification")
    texts = Examples(columns={"text": ["word1 good", "bad word2 word3"]})
    encoded = task.encode(task.load_processor(tmp_path / "one"), texts, None)
    graph = export_float(student, task.name, tmp_path / "one.onnx")
    assert {value.name for value in onnx.load(graph).graph.input} == {"input_ids", "attention_mask"}
    assert np.abs(onnx_logits(graph, encoded) - torch_logits(student.model, encoded)).max() < 1e-5


def test_calibration_passes_over_inputs_that_the_graph_does_not_take(graphs, make_texts):
    """Tokenizers give token types to models that have none."""
    _, graph = graphs("roberta")
    typed, plain = make_texts(4), make_texts(4, typed=False)
    assert find_ranges(graph, "int8_static", typed) == find_ranges(graph, "int8_static", plain)


def test_exporting_leaves_the_students_config_alone(make_model, tmp_path):
    student, task = student_of(make_model, "bert")
    student.save(tmp_path / "saved")
    before = student.model.config.edgekd
    export_float(student, task, tmp_path / "model.onnx")
    assert student.model.config.edgekd == before


def test_wrong_lowerings_are_refused(graphs, tmp_path):
    _, graph = graphs("bert")
    with pytest.raises(RecipeError, match=r"unknown lowering 'int8_dinamic' \(did you mean 'int8_dynamic'\?\)"):
        lower(graph, tmp_path / "x.onnx", "int8_dinamic")
    with pytest.raises(RecipeError, match="int8_static needs activation ranges"):
        lower(graph, tmp_path / "x.onnx", "int8_static")
    with pytest.raises(RecipeError, match="needs calibration data"):
        calibrate(graph, [])
    assert not (tmp_path / "x.onnx").exists()


def test_calibration_refuses_values_that_are_not_finite(graphs):
    _, graph = graphs("vit")
    with pytest.raises(RecipeError, match="without a finite range"):
        calibrate(graph, [{"pixel_values": np.full((1, 1, 8, 8), np.nan, np.float32)}])


def test_an_invalid_graph_is_refused_and_not_written(tmp_path):
    node = onnx.helper.make_node("NoSuchOperator", ["a"], ["b"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:]))
    with pytest.raises(StageError, match="not a valid ONNX model"):
        save_checked(graph, tmp_path / "bad.onnx")
    assert not (tmp_path / "bad.onnx").exists()


def test_parity_is_exact_with_itself_and_refuses_what_differs():
    logits = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    assert compare(logits, logits).max_abs == 0
    assert compare(logits, logits).agreement == 1
    with pytest.raises(StageError, match="differs from the torch model by"):
        require_parity(logits, logits + 0.1, "fp32", "the graph")
    with pytest.raises(StageError, match=r"agrees with the torch model on only .* of 50 examples"):
        require_parity(logits, -logits, "int8", "the graph")
    broken = logits.copy()
    broken[3, 1] = np.nan
    with pytest.raises(StageError, match="not finite"):
        require_parity(logits, broken, "int8", "the graph")


@pytest.fixture
def bundle(graphs, tmp_path):
    student, graph = graphs("bert")
    folder = tmp_path / "bundle"
    assemble(folder, artifact=graph, student=student)
    seal(folder, {"task": "text-classification"}, "a card")
    return folder


def test_a_bundle_vouches_for_every_file(bundle):
    manifest = read_manifest(bundle)
    present = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == present - {"edgekd.json"}
    assert {"onnx/model.onnx", "config.json", "tokenizer.json", "README.md"} <= present
    assert "edgekd" not in json.loads((bundle / "config.json").read_text())


def test_a_changed_missing_or_newer_bundle_is_refused(bundle):
    (bundle / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config.json is not the file that was bundled: its SHA-256 differs"):
        read_manifest(bundle)
    (bundle / "config.json").unlink()
    with pytest.raises(ModelError, match="incomplete: config.json is missing"):
        read_manifest(bundle)
    manifest = json.loads((bundle / "edgekd.json").read_text())
    (bundle / "edgekd.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(ModelError, match="has schema 99; this edgekd reads up to 1: update edgekd"):
        read_manifest(bundle)
    for text, said in (
        ('{"schema": 99}', "update edgekd"), ("{", "is damaged"), ("[]", "no JSON object with a number as schema"),
        ("{}", "no JSON object with a number"), ('{"schema": 1}', "does not say what files there are"),
    ):  # fmt: skip
        (bundle / "edgekd.json").write_text(text)
        with pytest.raises(ModelError, match=said):
            read_manifest(bundle)
    (bundle / "edgekd.json").unlink()
    with pytest.raises(ModelError, match="is not a bundle"):
        read_manifest(bundle)
