"""How integer graphs are written: whose scales, which layers, which rows, and what a default session makes of it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd.errors import ModelError
from edgekd.export.attention import stretch_masks
from edgekd.export.embeddings import integer_tables, quantize_rows
from edgekd.export.integer import quantization_of, quantize_weight
from edgekd.export.lower import calibrate, lower
from edgekd.export.masks import shorten_masks
from edgekd.export.names import module_of_name, multiplied, trained_ranges
from edgekd.export.onnx import export_float
from edgekd.export.operators import needs
from edgekd.export.rewrite import sort_nodes
from edgekd.export.rows import keep_first_rows
from edgekd.export.sizes import Sizes, fold_sizes
from edgekd.export.static import declare_domains
from edgekd.families.compact import install
from edgekd.quantize.fake.grid import snap_rows
from edgekd.student import Student, load_student

TEXT = ("bert", "roberta", "electra", "distilbert")
LAYERS = 3
CHANGES = {
    "plain": None,
    "fewer": ({"tokens": 5}, {}, {"tokens": 1}),
    "shared": ({"rank": 9}, {"shares": True}, {"shares": True, "tokens": 3}),
}
DYNAMIC = ("int8_dynamic", "int8_dynamic_fused", "int8_dynamic_lean")
STATIC = ("int8_static", "int8_static_lean")
PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "QGemm", "ConvInteger")


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    made: dict[tuple[str, str], tuple[Student, Path]] = {}

    def make(kind: str, change: str = "plain") -> tuple[Student, Path]:
        if (kind, change) not in made:
            side = "Sequence" if kind in TEXT else "Image"
            student = load_student(make_model(kind), auto_class=f"AutoModelFor{side}Classification")
            if (fields := CHANGES[change]) is not None:
                model = copy.deepcopy(student.model)
                layers = zip(student.arch.layers, fields, strict=True)
                install(model, student.family, [replace(layer, **field) for layer, field in layers])
                student = student.with_model(model)
            task = f"{'text' if kind in TEXT else 'image'}-classification"
            file = tmp_path_factory.mktemp(kind) / "float.onnx"
            made[kind, change] = student, export_float(student, task, file)
        return made[kind, change]

    return make


def feeds_of(file: Path, *, rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """With padding on the right of one row and on the left of another."""
    rng = np.random.default_rng(seed)
    names = [value.name for value in onnx.load(file, load_external_data=False).graph.input]
    if "pixel_values" in names:
        return {"pixel_values": rng.normal(size=(rows, 1, 8, 8)).astype(np.float32)}
    mask = np.ones((rows, length), np.int64)
    if rows > 1:
        mask[1, length // 2 :] = 0
    if rows > 2:
        mask[2, 1:3] = 0
    ids = rng.integers(5, 40, (rows, length))
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: values[name] for name in names}


def run(model: Path | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """In a session as a user makes it."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def loaded(file: Path, folder: Path) -> Counter[str]:
    """The operators of the graph that a default session runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "loaded.onnx").graph.node)


def linears_of(student: Student) -> set[str]:
    return {name for name, module in student.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def constants_of(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def model_type(student: Student) -> str:
    return student.model.config.model_type


KINDS = [*((kind, "plain") for kind in (*TEXT, "vit", "deit", "resnet")), *(
    (kind, change) for kind in ("bert", "distilbert", "vit") for change in ("fewer", "shared")
)]  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), KINDS)
def test_every_layer_of_the_model_is_found_in_its_graph(exported, kind: str, change: str) -> None:
    student, file = exported(kind, change)
    found = multiplied(onnx.load(file))
    assert set(found) == linears_of(student)
    assert len({node.name for node in found.values()}) == len(found)
    modules = dict(student.model.named_modules())
    constants = constants_of(onnx.load(file))
    for module, node in found.items():
        weight = constants[node.input[1]]
        if weight.ndim == 2:  # not merely as many: each is its own, whichever way round the exporter stores it
            own = modules[module].weight.detach().numpy()
            assert any(w.shape == own.shape and np.array_equal(w, own) for w in (weight, weight.T)), module


def test_names_of_nodes_tell_modules_and_children_of_sequences_are_not_told_twice() -> None:
    assert module_of_name("/bert/encoder/layer.0/attention/self/query/MatMul") == (
        "bert.encoder.layer.0.attention.self.query"
    )
    assert module_of_name("/classifier/classifier.1/Gemm") == "classifier.1"
    assert module_of_name("/Gather") == ""
    assert module_of_name("packed_0/MatMul") == ""


def test_layers_that_read_one_tensor_with_different_ranges_get_the_hull(exported) -> None:
    _, file = exported("bert")
    graph = onnx.load(file)
    scope = "bert.encoder.layer.1.attention.self"
    ranges = trained_ranges(graph, {f"{scope}.query": (-1.0, 2.0), f"{scope}.key": (-3.0, 1.0)})
    assert list(ranges.values()) == [(-3.0, 2.0)]
    with pytest.raises(ModelError, match=r"a layer the graph has not: unknown layer .*selv.query.*did you mean"):
        trained_ranges(graph, {"bert.encoder.layer.1.attention.selv.query": (0.0, 1.0)})


@pytest.mark.parametrize("form", STATIC)
@pytest.mark.parametrize(("kind", "change"), [("bert", "plain"), ("distilbert", "fewer"), ("vit", "shared")])
def test_scales_are_those_of_training(exported, kind: str, change: str, form: str, tmp_path: Path) -> None:
    _, file = exported(kind, change)
    rng = np.random.default_rng(1)
    source = onnx.load(file)
    spans: dict[str, tuple[float, float]] = {}
    activations = {}
    for module, node in multiplied(source).items():
        if node.op_type != "Conv":
            spans.setdefault(node.input[0], (float(-rng.uniform(1, 3)), float(rng.uniform(1, 3))))
            activations[module] = spans[node.input[0]]
    graph = onnx.load(lower(file, tmp_path / "x.onnx", form, activations=activations))
    makers = {name: node for node in graph.graph.node for name in node.output}
    constants = constants_of(graph)
    names = {node.name: module for module, node in multiplied(source).items()}
    seen = {}
    for node in graph.graph.node:
        if node.op_type not in ("MatMulIntegerToFloat", "MatMul") or names.get(node.name) not in activations:
            continue
        quantize = makers[node.input[0]]
        quantize = makers[quantize.input[0]] if quantize.op_type == "DequantizeLinear" else quantize
        assert quantize.op_type == "QuantizeLinear"
        scale, zero = quantization_of(*activations[names[node.name]])
        assert constants[quantize.input[1]] == scale
        assert constants[quantize.input[2]] == zero
        seen[names[node.name]] = quantize.output[0]
    assert set(seen) == set(activations)
    # One quantizer for each tensor: query, key and value share theirs unless they read different rows.
    assert len(set(seen.values())) <= len(spans) + 1
    # Residual additions read the float tensor.
    for node in graph.graph.node:
        if node.op_type in ("Add", "Sum") and not any(name in constants for name in node.input):
            assert not any(makers[name].op_type == "DequantizeLinear" for name in node.input if name in makers)


def test_weights_on_a_grid_get_their_own_integers_again() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-126, 127, (40, 30)).astype(np.int8)
    integers[rng.integers(0, 40, 30), np.arange(30)] = 127
    scales = rng.uniform(1e-4, 1e-1, 30).astype(np.float32)
    found, scale = quantize_weight(integers * scales)
    np.testing.assert_array_equal(found, integers)
    np.testing.assert_allclose(scale, scales, rtol=2e-7)
    zeros, scale = quantize_weight(np.zeros((4, 2), np.float32))
    assert not zeros.any()
    assert (scale == 1).all()


def test_a_range_without_zero_is_widened_and_an_empty_one_is_harmless() -> None:
    scale, zero = quantization_of(0.5, 2.55)
    assert (float(scale), int(zero)) == (np.float32(0.01), 0)
    scale, zero = quantization_of(-1.0, -0.5)
    assert (float(scale), int(zero)) == (np.float32(1 / 255), 255)
    assert [float(x) for x in quantization_of(0.0, 0.0)] == [1.0, 0.0]


@pytest.mark.parametrize("form", [*DYNAMIC, *STATIC])
def test_layers_to_keep_stay_float_and_no_others(exported, form: str, tmp_path: Path) -> None:
    student, file = exported("bert")
    wanted = (
        "bert.encoder.layer.1.attention.self.key", "bert.encoder.layer.2", "bert.embeddings.word_embeddings",
        "bert.pooler",
    )  # fmt: skip
    ranges = calibrate(file, [feeds_of(file)]) if form in STATIC else None
    graph = onnx.load(
        lower(file, tmp_path / "x.onnx", form, ranges=ranges, keep_float=wanted, model_type=model_type(student))
    )
    constants = constants_of(graph)
    floats = [
        value for value in constants.values() if value.dtype == np.float32 and value.ndim == 2 and value.size > 64
    ]
    table = student.model.bert.embeddings.word_embeddings.weight.detach().numpy()
    assert any(value.shape == table.shape and np.array_equal(value, table) for value in floats)
    kept = {name for name in linears_of(student) if name.startswith(wanted)}
    if form == "int8_dynamic_fused":  # one operator for the three, so all of them stay
        kept |= {f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "value")}
    modules = dict(student.model.named_modules())
    matrices = {name: modules[name].weight.detach().numpy() for name in linears_of(student)}
    left = {
        name
        for name, own in matrices.items()
        for value in floats
        if any(np.array_equal(piece, own) or np.array_equal(piece.T, own) for piece in _pieces(value, own))
    }
    assert left == kept
    unkept = lower(file, tmp_path / "all.onnx", form, ranges=ranges, model_type=model_type(student))
    assert (tmp_path / "all.onnx").stat().st_size < (tmp_path / "x.onnx").stat().st_size
    assert not np.array_equal(run(unkept, feeds_of(file)), run(tmp_path / "x.onnx", feeds_of(file)))


def _pieces(value: np.ndarray, own: np.ndarray) -> list[np.ndarray]:
    """A matrix, or the three that a fused attention holds side by side."""
    wide = value.shape[1] == 3 * own.shape[0] and value.shape[0] == own.shape[1]
    return np.split(value, 3, axis=1) if wide else [value]


def test_a_layer_to_keep_that_is_not_there_is_refused(exported, tmp_path: Path) -> None:
    _, file = exported("bert")
    with pytest.raises(ModelError, match=r"keep_float names what the graph has not: unknown module 'bert.pooler.dens'"):
        lower(file, tmp_path / "x.onnx", "int8_dynamic_lean", keep_float=["bert.pooler.dens"])
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("form", [*DYNAMIC, *STATIC])
def test_tables_have_a_scale_for_every_row_and_come_back_exactly(exported, form: str, tmp_path: Path) -> None:
    _, file = exported("bert")
    rng = np.random.default_rng(0)
    source = onnx.load(file)
    name = "bert.embeddings.word_embeddings.weight"
    (tensor,) = [tensor for tensor in source.graph.initializer if tensor.name == name]
    integers = rng.integers(-127, 128, tuple(tensor.dims)).astype(np.int8)
    integers[:, 0] = 127
    scales = rng.uniform(0.001, 0.1, (len(integers), 1)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(integers * scales, name))
    onnx.save(source, tmp_path / "snapped.onnx")
    ranges = calibrate(file, [feeds_of(file)]) if form in STATIC else None
    made = onnx.load(lower(tmp_path / "snapped.onnx", tmp_path / "x.onnx", form, ranges=ranges, model_type="bert"))
    constants = constants_of(made)
    np.testing.assert_array_equal(constants[f"{name}_quantized"], integers)
    assert constants[f"{name}_scale"].shape == (len(integers), 1)
    output = "/bert/embeddings/word_embeddings/Gather_output_0"
    made.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    feeds = feeds_of(file)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run([output], feeds)[0], (integers * scales)[feeds["input_ids"]])
    floats = lower(file, tmp_path / "float.onnx", form, ranges=ranges, model_type="bert", table_bits=0)
    assert name in constants_of(onnx.load(floats))


@pytest.mark.parametrize("width", [32, 80, 18])
def test_tables_of_4_bits_come_back_as_the_nearest_of_their_grid(width: int) -> None:
    table = np.random.default_rng(0).normal(size=(40, width)).astype(np.float32)
    table[3] = 0.0
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])
    node = helper.make_node("Gather", ["table", "ids"], ["y"], "rows")
    graph = helper.make_graph([node], "g", [ids], [y], [numpy_helper.from_array(table, "table")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert integer_tables(model, bits=4) == 1
    session = ort.InferenceSession(declare_domains(model).SerializeToString(), providers=["CPUExecutionProvider"])
    seen = session.run(["y"], {"ids": np.arange(40)})[0]
    wanted = snap_rows(torch.from_numpy(table), bits=4).numpy()
    # Scales and results are of half precision; a weight halfway between two integers may go to either.
    step = np.repeat(np.abs(wanted).reshape(40, -1).max(1, keepdims=True) / 7, width, axis=1)
    assert (np.abs(seen - table) <= 0.51 * step + 1e-3).all()
    assert np.isclose(seen, wanted, rtol=2e-3, atol=1e-4).mean() > 0.99
    assert constants_of(model)["table_quantized"].nbytes == table.size // 2


def test_a_table_of_odd_width_keeps_8_bits() -> None:
    table = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    node = helper.make_node("Gather", ["table", "ids"], ["y"], "rows")
    model = helper.make_model(helper.make_graph([node], "g", [ids], [y], [numpy_helper.from_array(table, "table")]))
    assert integer_tables(model, bits=4) == 1
    assert constants_of(model)["table_quantized"].dtype == np.int8


def test_a_table_that_something_else_reads_stays_float() -> None:
    table = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "rows"),
        helper.make_node("MatMul", ["rows", "turned"], ["y"]),
        helper.make_node("Transpose", ["table"], ["turned"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_model(
        helper.make_graph(nodes[:1] + nodes[:0:-1], "g", [ids], [y], [numpy_helper.from_array(table, "table")])
    )
    assert integer_tables(graph) == 0
    integers, scales = quantize_rows(np.zeros((3, 2), np.float32))
    assert not (integers * scales).any()


@pytest.mark.parametrize(("kind", "change"), KINDS)
def test_a_lean_graph_says_the_same_at_any_batch_and_length(exported, kind: str, change: str, tmp_path: Path) -> None:
    _, file = exported(kind, change)
    lean = lower(file, tmp_path / "lean.onnx", "fp32_lean")
    integer = lower(file, tmp_path / "integer.onnx", "int8_dynamic_lean")
    for rows, length in ((1, 3), (3, 12), (2, 17)):
        feeds = feeds_of(file, rows=rows, length=length, seed=length)
        expected = run(file, feeds)
        np.testing.assert_allclose(run(lean, feeds), expected, atol=2e-6, rtol=0)
        assert 0 < np.abs(run(integer, feeds) - expected).max() < 0.03
    nodes = Counter(node.op_type for node in onnx.load(lean).graph.node)
    # Attention whose probabilities choose tokens or serve a second layer stays in its parts.
    fused = {"plain": LAYERS, "fewer": LAYERS - 1, "shared": 0}[change] if kind != "resnet" else 0
    assert nodes["Attention"] == fused
    if change == "fewer":  # rows of chosen tokens: of the context and of the residual
        assert nodes["GatherND"] >= 2
        assert nodes["Range"] == nodes["ReduceProd"] == 0
    if change == "plain":
        assert nodes["Transpose"] <= 1  # that of the patches
        assert nodes["Softmax"] == 0


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_lean_graph_may_have_fixed_shapes(exported, kind: str, tmp_path: Path) -> None:
    _, file = exported(kind)
    feeds = feeds_of(file, rows=1, length=12)
    ranges = calibrate(file, [feeds])
    sizes = {"batch": 1, "sequence": 12 if kind == "bert" else None}
    fixed = lower(file, tmp_path / "fixed.onnx", "int8_static_lean", ranges=ranges, **sizes)
    free = lower(file, tmp_path / "free.onnx", "int8_static_lean", ranges=ranges)
    np.testing.assert_allclose(run(fixed, feeds), run(free, feeds), atol=1e-3)
    assert not {"Shape", "Where", "Range"} & {node.op_type for node in onnx.load(fixed).graph.node}


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_the_last_layer_computes_the_row_that_the_head_reads(exported, kind: str, tmp_path: Path) -> None:
    student, file = exported(kind)
    graph = onnx.load(lower(file, tmp_path / "lean.onnx", "fp32_lean"))
    places = student.family.places
    last = student.family.layers(student.model)[-1]
    prefix = next(name for name, module in student.model.named_modules() if module is last)
    products = multiplied(graph)
    outputs = {part: products[f"{prefix}.{part}"].output[0] for part in (places.up, places.attention_output)}
    key = f"{prefix}.{places.attention}.{places.qkv[1]}"
    outputs["key"] = products[key].output[0]
    graph.graph.output.extend([helper.make_tensor_value_info(x, TensorProto.FLOAT, None) for x in outputs.values()])
    feeds = feeds_of(file)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = dict(zip(outputs, (x.shape for x in session.run(list(outputs.values()), feeds)), strict=True))
    assert shapes[places.up][:2] == shapes[places.attention_output][:2] == (3, 1)
    assert shapes["key"][1] > 1


def test_rows_that_another_output_reads_are_computed() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "one"),
        helper.make_node("Relu", ["h"], ["r"], "two"),
        helper.make_node("Gather", ["r", "zero"], ["y"], "pick", axis=1),
    ]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(0), "zero")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 4])

    def model(*outputs: str) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        made = helper.make_graph(nodes, "g", [x], values, tensors)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    feeds = {"x": np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)}
    alone, both, whole = model("y"), model("y", "h"), model("y", "r")
    expected = run(alone, feeds)
    assert keep_first_rows(alone) == {"x": "x_first"}
    assert keep_first_rows(both) == {"h": "h_first"}
    assert keep_first_rows(whole) == {}
    for graph in (alone, both, whole):
        np.testing.assert_array_equal(run(graph, feeds), expected)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_default_session_runs_integer_products_and_nothing_slow(exported, kind: str, tmp_path: Path) -> None:
    student, file = exported(kind)
    layers = len([name for name, module in student.model.named_modules() if isinstance(module, nn.Linear)])
    ranges = calibrate(file, [feeds_of(file)])
    for form in ("int8_dynamic_lean", *STATIC):
        nodes = loaded(lower(file, tmp_path / f"{form}.onnx", form, ranges=ranges), tmp_path)
        assert nodes["MatMulIntegerToFloat"] + nodes["DynamicQuantizeMatMul"] == layers, form
        assert not nodes.keys() & {"SkipLayerNormalization", "MatMulInteger", "MatMulNBits", "Gemm"}, form
        if form.endswith("_lean"):
            assert nodes["MatMul"] == nodes["BiasGelu"] == nodes["Softmax"] == 0
            assert nodes["Attention"] == LAYERS


def test_query_key_and_value_share_one_quantizer(exported, tmp_path: Path) -> None:
    _, file = exported("bert")
    graph = onnx.load(lower(file, tmp_path / "x.onnx", "int8_dynamic_lean"))
    quantizers = [node for node in graph.graph.node if node.op_type == "DynamicQuantizeLinear"]
    # Four tensors a layer, the first token of the last layer's input, pooler and classifier.
    assert len(quantizers) == 4 * LAYERS + 1 + 2
    assert len({node.input[0] for node in quantizers}) == len(quantizers)


def test_masks_of_another_kind_are_left_alone() -> None:
    graph = _attention_over("Greater")
    before = graph.SerializeToString()
    assert shorten_masks(graph) == 0
    assert graph.SerializeToString() == before
    plain = _attention_over("Equal")
    ids = {"attention_mask": np.array([[1, 1, 0, 1]]), "x": np.random.default_rng(0).normal(size=(1, 4, 4))}
    feeds = {"attention_mask": ids["attention_mask"], "x": ids["x"].astype(np.float32)}
    expected = run(plain, feeds)
    assert shorten_masks(plain) == 1
    stretch_masks(plain)
    assert "Where" not in {node.op_type for node in plain.graph.node}
    np.testing.assert_allclose(run(plain, feeds), expected, atol=1e-6)


def _attention_over(comparison: str) -> onnx.ModelProto:
    """Attention with keys barred where the mask is 0 (`Equal`), or is not greater than 0 at all (all of them)."""
    numbers = {
        "zero": np.array(0, np.int64),
        "none": np.float32(0),
        "never": np.float32(-1e9),
        "axes": np.array([1, 2]),
    }
    order = ["never", "none"] if comparison == "Equal" else ["none", "never"]
    if comparison == "Greater":
        numbers["zero"] = np.array(5, np.int64)
    nodes = [
        helper.make_node(comparison, ["attention_mask", "zero"], ["barred"]),
        helper.make_node("Where", ["barred", *order], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "axes"], ["wide"]),
        helper.make_node("Expand", ["wide", "shape"], ["mask"]),
        helper.make_node("Attention", ["x", "x", "x", "mask"], ["y"], q_num_heads=2, kv_num_heads=2),
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()]
    tensors.append(numpy_helper.from_array(np.array([1, 1, 4, 4]), "shape"))
    given = [
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, 4]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4]),
    ]
    told = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4])]
    return helper.make_model(
        helper.make_graph(nodes, "g", given, told, tensors), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )


def test_sizes_that_are_known_become_constants_and_others_do_not() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["width"], axis=0),
        helper.make_node("Cast", ["width"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["real"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["scaled"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"], axis=0),
        helper.make_node("Concat", ["batch", "whole"], ["flat"], axis=0),
        helper.make_node("Reshape", ["scaled", "flat"], ["y"]),
    ]
    numbers = {"last": [2], "first": [0], "whole": [-1]}
    tensors = [numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    sizes = Sizes(graph)
    assert sizes.scalar("root") == 4.0
    assert list(sizes.value("flat")) == ["b", -1]
    assert sizes.scalar("batch") is None
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)}
    expected = run(graph, feeds)
    fold_sizes(graph)
    assert [node.op_type for node in graph.graph.node] == ["Div", "Reshape"]
    np.testing.assert_array_equal(run(graph, feeds), expected)


@pytest.mark.parametrize(("form", "error"), [("fp16_weights", 2**-11), ("bf16", 2**-8)])
def test_weights_of_16_bits_are_half_the_file_and_nearly_the_same(exported, form, error, tmp_path: Path) -> None:
    _, file = exported("resnet")
    made = lower(file, tmp_path / "x.onnx", form)
    assert made.stat().st_size < 0.6 * file.stat().st_size
    session = ort.InferenceSession(str(made), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(float)"
    feeds = feeds_of(file)
    expected = run(file, feeds)
    assert 0 < np.abs(run(made, feeds) - expected).max() < 20 * error * np.abs(expected).max()


def test_the_manifest_is_told_what_a_runtime_needs(exported, tmp_path: Path) -> None:
    _, file = exported("bert")
    assert needs(file) == {"opset": 18, "domains": [], "onnxruntime": ">=1.22", "session_options": {}}
    told = needs(lower(file, tmp_path / "x.onnx", "int8_dynamic_lean"))
    assert (told["opset"], told["domains"], told["onnxruntime"]) == (23, ["com.microsoft"], ">=1.23")


def test_nodes_are_put_in_order_and_a_loop_is_an_error() -> None:
    nodes = [helper.make_node("Relu", ["b"], ["c"], "later"), helper.make_node("Relu", ["a"], ["b"], "sooner")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ac"]
    graph = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))
    assert [node.name for node in sort_nodes(graph).graph.node] == ["sooner", "later"]
    graph.graph.node[0].input[0] = "c"
    with pytest.raises(ValueError, match="the graph has a loop"):
        sort_nodes(graph)


def test_integers_of_a_lean_graph_are_those_that_torch_would_have(exported, tmp_path: Path) -> None:
    student, file = exported("bert")
    constants = constants_of(onnx.load(lower(file, tmp_path / "x.onnx", "int8_dynamic_lean")))
    modules = dict(student.model.named_modules())
    for module, node in multiplied(onnx.load(file)).items():
        weight = modules[module].weight.detach()
        scale = weight.abs().amax(dim=1) / 127
        expected = torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8)
        np.testing.assert_array_equal(constants[f"{node.name}_weight_quantized"], expected.T.numpy())
        np.testing.assert_array_equal(constants[f"{node.name}_weight_scale"], scale.numpy())
