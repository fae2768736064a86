"""The forms for NPUs and GPUs: fixed shapes, float16, QDQ; and the check of operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edgekd.errors import ModelError, RecipeError
from edgekd.export.lower import LOWERINGS, calibrate, lower, precision_of
from edgekd.export.masks import MARGIN, plain_masks
from edgekd.export.onnx import export_float
from edgekd.export.operators import check_operators
from edgekd.export.static import drop_unused, fix_shapes, free_dimensions, simplify
from edgekd.student import load_student
from edgekd.target import Target
from edgekd.target_fields import RUNTIMES

LENGTH = 16
QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
SHAPES = ("Shape", "Range", "ConstantOfShape")


def feeds_of(graph: Path, *, rows: int = 1, length: int = LENGTH, padding: int = 0, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    names = {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    if "pixel_values" in names:
        return {"pixel_values": rng.normal(size=(rows, 1, 8, 8)).astype(np.float32)}
    mask = np.ones((rows, length), np.int64)
    mask[:, length - padding :] = 0
    values = {
        "input_ids": np.where(mask, rng.integers(5, 40, (rows, length)), 0),
        "attention_mask": mask,
        "token_type_ids": np.zeros((rows, length), np.int64),
    }
    return {name: value for name, value in values.items() if name in names}


def run(model: Path | onnx.ModelProto, feeds: dict) -> np.ndarray:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def kinds_of(model: Path | onnx.ModelProto) -> set[str]:
    return {node.op_type for node in (onnx.load(model) if isinstance(model, Path) else model).graph.node}


@pytest.fixture(scope="module")
def floats(make_model, tmp_path_factory):
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            text = kind in ("bert", "roberta", "electra", "distilbert")
            auto = "AutoModelForSequenceClassification" if text else "AutoModelForImageClassification"
            task = "text-classification" if text else "image-classification"
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = export_float(load_student(make_model(kind), auto_class=auto), task, folder / "float.onnx")
        return made[kind]

    return make


@pytest.fixture(scope="module")
def ranges(floats):
    made: dict[str, dict] = {}

    def make(kind: str) -> dict:
        if kind not in made:
            graph = floats(kind)
            # Many: what goes beyond the ranges is cut off, in 16 bits no less than in 8.
            feeds = [feeds_of(graph, rows=64, length=length, seed=length) for length in (8, 12, LENGTH)]
            made[kind] = calibrate(graph, feeds, operators=None)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_graph_of_fixed_shapes_says_the_same_and_computes_no_shapes(floats, kind: str) -> None:
    source = onnx.load(floats(kind))
    before = source.SerializeToString()
    fixed = fix_shapes(source, batch=2, sequence=LENGTH)
    assert source.SerializeToString() == before
    feeds = feeds_of(floats(kind), rows=2, padding=5)
    np.testing.assert_allclose(run(fixed, feeds), run(source, feeds), atol=1e-5)
    assert free_dimensions(source)
    assert free_dimensions(fixed) == []
    assert not kinds_of(fixed) & set(SHAPES)
    assert [item.domain for item in fixed.opset_import] == [""]


def test_a_dimension_nobody_tells_is_refused(floats) -> None:
    source = onnx.load(floats("bert"))
    with pytest.raises(ModelError, match="input input_ids leaves sequence_length open; say its size: a sequence"):
        fix_shapes(source, batch=1)
    fixed = fix_shapes(source, sizes={"sequence_length": 8, "batch_size": 3})
    assert [dim.dim_value for dim in fixed.graph.input[0].type.tensor_type.shape.dim] == [3, 8]
    with pytest.raises(ModelError, match="input input_ids has 2 dimensions"):
        fix_shapes(source, sequence=8, sizes={"input_ids": [1, 8, 8]})
    with pytest.raises(ModelError, match="axis 2 of input pixel_values is fixed at 8; 9 was asked"):
        fix_shapes(onnx.load(floats("vit")), sizes={"pixel_values": [1, 1, 9, 8]})
    image = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, "width"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_model(helper.make_graph([helper.make_node("Relu", ["pixels"], ["y"])], "g", [image], [out]))
    with pytest.raises(ModelError, match=r"input pixels leaves width open; say its size: sizes=\{'width': …\}"):
        fix_shapes(graph)


@pytest.mark.parametrize("kind", ["bert", "vit", "resnet"])
def test_float16_says_nearly_the_same_with_half_the_bytes(floats, kind: str, tmp_path: Path) -> None:
    graph = floats(kind)
    file = lower(graph, tmp_path / "fp16.onnx", "fp16", batch=1, sequence=LENGTH)
    feeds = feeds_of(graph, padding=5)
    expected = run(graph, feeds)
    assert 0 < np.abs(run(file, feeds) - expected).max() < 1e-2 * max(1.0, float(np.abs(expected).max()))
    model = onnx.load(file)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    weights = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 64]
    assert {t.data_type for t in weights if t.data_type != TensorProto.INT64} == {TensorProto.FLOAT16}
    assert precision_of("fp16") == "fp16"


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "vit", "deit", "resnet"])
@pytest.mark.parametrize("form", ["int8_qdq", "int16_qdq"])
def test_full_qdq_agrees_with_float_padded_or_not(floats, ranges, kind: str, form: str, tmp_path: Path) -> None:
    graph = floats(kind)
    file = lower(graph, tmp_path / "qdq.onnx", form, ranges=ranges(kind), batch=1, sequence=LENGTH)
    expected, got = [], []
    for seed in range(12):
        feeds = feeds_of(graph, padding=seed % 6, seed=100 + seed)
        expected.append(run(graph, feeds)[0])
        got.append(run(file, feeds)[0])
    correlation = np.corrcoef(np.ravel(expected), np.ravel(got))[0, 1]
    assert correlation > (0.98 if form == "int8_qdq" else 0.997)
    model = onnx.load(file)
    floating = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    assert all("_scale" in tensor.name for tensor in floating)
    wide = {TensorProto.UINT16} if form == "int16_qdq" else set()
    assert wide <= {tensor.data_type for tensor in model.graph.initializer}
    assert not kinds_of(model) & {"Erf", "Where", *SHAPES}
    assert {node.domain for node in model.graph.node} == {""}
    assert precision_of(form) == "int8"


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_without_a_batch_qdq_keeps_free_dimensions(floats, ranges, kind: str, tmp_path: Path) -> None:
    graph = floats(kind)
    file = lower(graph, tmp_path / "qdq.onnx", "int8_qdq", ranges=ranges(kind))
    for rows, length in ((1, 8), (3, 12)):
        feeds = feeds_of(graph, rows=rows, length=length)
        assert np.corrcoef(run(graph, feeds).ravel(), run(file, feeds).ravel())[0, 1] > 0.95


@pytest.mark.parametrize("kind", ["bert", "vit", "resnet"])
def test_symmetric_qdq_has_zero_points_0_and_only_where_it_multiplies(floats, ranges, kind, tmp_path: Path) -> None:
    graph = floats(kind)
    file = lower(
        graph, tmp_path / "qdq.onnx", "int8_qdq", ranges=ranges(kind), symmetric=True, batch=1, sequence=LENGTH
    )
    model = onnx.load(file)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    users: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert pairs
    for node in pairs:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
        assert users[node.output[0]] <= {"MatMul", "Gemm", "Conv"}
    feeds = feeds_of(graph, padding=4)
    assert np.abs(run(file, feeds) - run(graph, feeds)).max() < 0.25


@pytest.mark.parametrize("form", ["int8_qdq", "int16_qdq"])
def test_masked_positions_do_not_matter(floats, ranges, form: str, tmp_path: Path) -> None:
    graph = floats("bert")
    file = lower(graph, tmp_path / "qdq.onnx", form, ranges=ranges("bert"), batch=1, sequence=LENGTH)
    one, other = feeds_of(graph, padding=6), feeds_of(graph, padding=6)
    other["input_ids"] = other["input_ids"] + np.where(other["attention_mask"] == 0, 7, 0)
    assert (one["input_ids"] != other["input_ids"]).any()
    change = np.abs(run(file, one) - run(file, other)).max()
    if form == "int8_qdq":
        assert change == 0  # below half a step of the softmax
        return
    unmasked = {**other, "attention_mask": np.ones_like(other["attention_mask"])}
    seen = np.abs(run(file, one) - run(file, unmasked)).max()
    assert seen > 0
    assert change < 0.1 * seen


def test_a_plain_mask_bars_just_below_the_scores(floats, ranges) -> None:
    graph = simplify(fix_shapes(onnx.load(floats("bert")), sequence=LENGTH))
    feeds = feeds_of(floats("bert"), padding=6)
    expected = run(graph, feeds)
    known = ranges("bert")
    changed = plain_masks(graph, known)
    drop_unused(graph)
    assert "Where" not in kinds_of(graph)
    np.testing.assert_allclose(run(graph, feeds), expected, atol=2e-3)
    (bar,) = [low for name, (low, _) in changed.items() if name.endswith("/mask")]
    scores = [name for name in changed if name in known]
    assert len(scores) == 3  # one in each layer
    assert all(changed[name][1] <= known[name][1] and changed[name][0] > bar - MARGIN for name in scores)


def test_a_mask_that_also_bars_the_future_stays_as_it_is() -> None:
    bar = onnx.numpy_helper.from_array(np.array(-1e9, np.float32), "bar")
    zero = onnx.numpy_helper.from_array(np.array(0, np.float32), "zero")
    axes = onnx.numpy_helper.from_array(np.array([1, 3]), "axes")  # bars queries, not keys
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.BOOL),
        helper.make_node("Where", ["seen", "zero", "bar"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "axes"], ["mask"]),
        helper.make_node("Add", ["scores", "mask"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [2, 5]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [2, 1, 5, 5]),
    ]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 1, 5, 5])]
    graph = helper.make_model(
        helper.make_graph(nodes, "g", inputs, out, [bar, zero, axes]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    before = graph.SerializeToString()
    assert plain_masks(graph, {"scores": (-1.0, 1.0)}) == {}
    assert graph.SerializeToString() == before
    graph.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(np.array([1, 2]), "axes"))  # keys: a plain one
    assert plain_masks(graph, {"scores": (-1.0, 1.0)})["y"] == (-1.0 - MARGIN, 1.0)


def test_full_qdq_without_the_ranges_it_needs_is_refused(floats, ranges, tmp_path: Path) -> None:
    graph = floats("bert")
    with pytest.raises(RecipeError, match="int8_qdq needs activation ranges"):
        lower(graph, tmp_path / "x.onnx", "int8_qdq")
    few = dict(list(ranges("bert").items())[:40])
    with pytest.raises(RecipeError, match=r"no calibrated range for \d+ tensors \("):
        lower(graph, tmp_path / "x.onnx", "int8_qdq", ranges=few, batch=1, sequence=LENGTH)
    with pytest.raises(RecipeError, match="int8_tflite is made from the torch model"):
        lower(graph, tmp_path / "x.onnx", "int8_tflite")
    assert not (tmp_path / "x.onnx").exists()


def test_the_lowerings_are_those_of_the_runtimes() -> None:
    everywhere = {name for runtime in RUNTIMES.values() for name in runtime.lowerings}
    assert set(LOWERINGS) == everywhere - {"int8_tflite"}
    assert len(LOWERINGS) == len(set(LOWERINGS))


def target_of(**fields: object) -> Target:
    given = {
        "name": "box",
        "title": "Box",
        "runtime": "onnxruntime",
        "device": "npu",
        "precisions": ("fp32",),
        **fields,
    }
    return Target(**given)


def test_operators_a_target_does_not_run_are_told(floats) -> None:
    graph = onnx.load(floats("bert"))
    assert check_operators(graph, target_of()) == []
    told = check_operators(floats("bert"), target_of(unsupported_operators=("Erf", "Sin"), shapes="static"))
    assert told[0].startswith("box needs static shapes: input_ids [batch_size, sequence_length], ")
    assert told[1:] == ["box does not run Erf (3 in the graph)"]
    everything = tuple({node.op_type for node in graph.graph.node})
    assert check_operators(graph, target_of(operators=everything)) == []
    assert check_operators(graph, target_of(operators=everything, unsupported_operators=("Erf",))) == told[1:]
    graph.graph.node[0].domain = "com.microsoft"
    kind = graph.graph.node[0].op_type
    assert f"box does not run com.microsoft.{kind} (1 in the graph)" in check_operators(
        graph, target_of(operators=everything)
    )
    assert check_operators(graph, target_of(operators=(*everything, f"com.microsoft.{kind}"))) == []


@pytest.mark.device
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_openvino_runs_the_same_qdq(floats, ranges, kind: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    graph = floats(kind)
    file = lower(graph, tmp_path / "qdq.onnx", "int8_qdq", ranges=ranges(kind), batch=1, sequence=LENGTH)
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [value.name for value in ort.InferenceSession(str(file)).get_inputs()]
    expected, got = [], []
    for seed in range(12):
        feeds = feeds_of(graph, padding=seed % 6, seed=seed)
        expected.append(run(file, feeds)[0])
        got.append(next(iter(model({name: feeds[name] for name in names}).values()))[0])
    assert np.corrcoef(np.ravel(expected), np.ravel(got))[0, 1] > 0.97
