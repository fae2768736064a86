"""Models with other operators as ONNX: what torch says, at batches and lengths that were not exported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekd.export.layers import quantized_layers
from edgekd.export.lower import fuse, lower
from edgekd.export.onnx import export_float
from edgekd.export.packed import pack_projections
from edgekd.export.scales import weights_of
from edgekd.export.static import fix_shapes, free_dimensions
from edgekd.families.compact import install
from edgekd.student import Student, load_student

TEXT = ["bert", "roberta", "electra", "distilbert"]
KINDS = [*TEXT, "vit", "deit"]
CHANGES = {
    "fewer": ({"tokens": 5, "activation": "quick_gelu"}, {}, {"tokens": 1}),
    "shared": ({"rank": 9}, {"shares": True, "norm": "affine"}, {"shares": True, "tokens": 3}),
}
CLOSE = {"fp32": 2e-6, "fp32_fused": 2e-6, "fp32_lean": 2e-6, "int8_dynamic_fused": 0.03, "int8_dynamic_lean": 0.03}


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    made: dict[tuple[str, str], tuple[Student, Path]] = {}

    def make(kind: str, change: str) -> tuple[Student, Path]:
        if (kind, change) not in made:
            side = "Sequence" if kind in TEXT else "Image"
            own = load_student(make_model(kind), auto_class=f"AutoModelFor{side}Classification")
            model = copy.deepcopy(own.model)
            layers = zip(own.arch.layers, CHANGES[change], strict=True)
            install(model, own.family, [replace(layer, **change) for layer, change in layers])
            student = own.with_model(model)
            task = f"{'text' if kind in TEXT else 'image'}-classification"
            file = tmp_path_factory.mktemp("compact") / f"{kind}-{change}.onnx"
            made[kind, change] = student, export_float(student, task, file)
        return made[kind, change]

    return make


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    if kind not in TEXT:
        return [{"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator)} for rows in (1, 5)]
    made = []
    for rows, length, real in ((1, 3, 3), (1, 11, 11), (4, 13, 4)):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[-1, real:] = 0
        ids = torch.randint(5, 40, (rows, length), generator=generator) * mask
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def run(graph: Path | onnx.ModelProto, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """In a session with default options."""
    source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in batch.items()}
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros_like(feeds["input_ids"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("kind", TEXT)
def test_layers_that_choose_tokens_do_not_keep_the_exporters_mask(exported, kind: str, tmp_path: Path) -> None:
    _, graph = exported(kind, "fewer")
    nodes = onnx.load(lower(graph, tmp_path / "lean.onnx", "fp32_lean")).graph.node
    assert [node.name for node in nodes if "attention_mask" in node.input] == ["edgekd/attention_mask/wide"]


@pytest.mark.parametrize(
    ("kind", "change"),
    [*((kind, "fewer") for kind in KINDS), ("bert", "shared"), ("distilbert", "shared"), ("vit", "shared")],
)
def test_the_graph_says_what_torch_says(exported, kind, change, tmp_path):
    student, graph = exported(kind, change)
    for lowering, tolerance in CLOSE.items():
        file = lower(graph, tmp_path / f"{lowering}.onnx", lowering, model_type=student.model.config.model_type)
        for batch in batches(kind):
            with torch.no_grad():
                told = student.model.eval()(**batch).logits.numpy()
            np.testing.assert_allclose(run(file, batch), told, atol=tolerance, rtol=0, err_msg=lowering)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_layers_that_drop_tokens_bear_the_names_of_their_modules(exported, kind, tmp_path):
    """Also as integers, their biases elsewhere: the output of attention is not taken for that of the neurons."""
    student, graph = exported(kind, "fewer")
    weights = weights_of(student.model)
    file = lower(graph, tmp_path / "lean.onnx", "int8_dynamic_lean", model_type=student.model.config.model_type)
    found = [layer.module for layer in quantized_layers(onnx.load(file))]
    assert len(set(found)) == len(found)
    assert set(found) <= set(weights)
    assert sum(".layer.0." in name for name in found) == sum(".layer.0." in name for name in weights)


def test_layers_with_all_tokens_are_still_fused(exported, make_model, tmp_path):
    own = load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")
    model = copy.deepcopy(own.model)
    install(model, own.family, [*own.arch.layers[:-1], replace(own.arch.layers[-1], tokens=1)])
    graph = export_float(own.with_model(model), "text-classification", tmp_path / "f.onnx")
    kinds = [node.op_type for node in fuse(onnx.load(graph), "bert").graph.node]
    assert kinds.count("Attention") == 2
    _, shared = exported("bert", "shared")
    nodes = fuse(onnx.load(shared), "bert").graph.node
    assert "Attention" not in [node.op_type for node in nodes]
    assert not any(node.name.startswith("edgekd") for node in nodes)


def test_reduced_layers_do_not_work_out_sizes(exported):
    _, graph = exported("vit", "fewer")
    nodes = [node.op_type for node in onnx.load(graph).graph.node if node.name.startswith("/vit/encoder/layer.0/")]
    assert nodes.count("Shape") == 2  # for how many tokens to choose, and where each sample begins


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("change", CHANGES)
def test_shapes_can_be_fixed(exported, kind, change):
    student, graph = exported(kind, change)
    batch = {name: value[:1] for name, value in batches(kind)[1].items()}
    length = batch["input_ids"].shape[1] if kind in TEXT else None
    sizes = {} if kind in TEXT else {"pixel_values": (1, 1, 8, 8)}
    fixed = fix_shapes(onnx.load(graph), batch=1, sequence=length, sizes=sizes)
    assert free_dimensions(fixed) == []
    assert not {"Shape", "Range"} & {node.op_type for node in fixed.graph.node}
    with torch.no_grad():
        told = student.model.eval()(**batch).logits.numpy()
    np.testing.assert_allclose(run(fixed, batch), told, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_packed_projections_say_the_same(exported, kind):
    _, file = exported(kind, "fewer")
    graph = onnx.load(file)
    products = [node.op_type for node in graph.graph.node].count("MatMul")
    gone = pack_projections(graph)
    onnx.checker.check_model(graph)
    # Layers 0 and 1 have three projections of one tensor; the query of the last reads the first token alone.
    assert gone == 2 + 2 + 1
    assert [node.op_type for node in graph.graph.node].count("MatMul") == products - gone
    for batch in batches(kind):
        np.testing.assert_allclose(run(graph, batch), run(file, batch), atol=1e-6, rtol=0)


def test_only_projections_with_constants_that_nobody_else_reads_are_packed():
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for name, width in (("a", 3), ("b", 2), ("c", 4), ("d", 5)):
        tensors.append(numpy_helper.from_array(rng.normal(size=(6, width)).astype(np.float32), f"w{name}"))
        tensors.append(numpy_helper.from_array(rng.normal(size=(width,)).astype(np.float32), f"b{name}"))
        source = "y" if name == "d" else "x"
        nodes.append(helper.make_node("MatMul", [source, f"w{name}"], [f"m{name}"]))
        nodes.append(helper.make_node("Add", [f"m{name}", f"b{name}"] if name != "b" else ["bb", "mb"], [f"o{name}"]))
    value = helper.make_tensor_value_info
    given = [value(name, TensorProto.FLOAT, ["n", 6]) for name in ("x", "y")]
    told = [value(name, TensorProto.FLOAT, None) for name in ("oa", "ob", "oc", "od", "mc")]
    graph = helper.make_model(
        helper.make_graph(nodes, "g", given, told, tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    before = copy.deepcopy(graph)
    # c's product is an output itself and d reads something else: a and b remain.
    assert pack_projections(graph) == 1
    assert {tensor.name for tensor in graph.graph.initializer} >= {"wc", "wd"}
    assert not {"wa", "wb"} & {tensor.name for tensor in graph.graph.initializer}
    feeds = {name: rng.normal(size=(2, 6)).astype(np.float32) for name in ("x", "y")}
    sides = [
        ort.InferenceSession(g.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
        for g in (before, graph)
    ]
    for ours, theirs in zip(*sides, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
