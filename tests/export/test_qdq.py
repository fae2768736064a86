"""Q/DQ graphs with trained scales: who gets them, what keeps 16 bits, and what is computed beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from edgekd.errors import ModelError
from edgekd.export.blame import blame
from edgekd.export.factors import factors_of, fold_factors
from edgekd.export.layers import quantized_layers
from edgekd.export.lower import lower
from edgekd.export.parity import onnx_logits
from edgekd.export.scales import check_scales, expected_scale
from edgekd.export.static import fix_shapes, simplify
from edgekd.export.widths import overrides, wide_tensors

LENGTH = 16
DENSE = "bert.encoder.layer.1.output.dense"
CONTEXT = "bert.encoder.layer.0.attention.output.dense"


def lowered(made: Any, folder: Path, form: str = "int8_qdq", **options: Any) -> Path:
    file = folder / f"{form}-{len(list(folder.iterdir()))}.onnx"
    return lower(made.graph, file, form, **{"ranges": made.ranges, "batch": 1, "sequence": LENGTH, **options})


def scales(graph: onnx.ModelProto) -> dict[str, tuple[float, int, np.dtype]]:
    """Scale, zero point and type of every quantized tensor, by its name."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    return {
        node.input[0]: (float(values[node.input[1]]), int(values[node.input[2]]), values[node.input[2]].dtype)
        for node in graph.graph.node
        if node.op_type == "QuantizeLinear"
    }


def test_a_trained_scale_goes_to_all_tensors_with_the_same_values(snapped: Any, tmp_path: Path) -> None:
    made = snapped("bert")
    span = (-1.5, 1.0)
    graph = onnx.load(lowered(made, tmp_path, activations={CONTEXT: span}))
    found = scales(graph)
    scale, zero = expected_scale(span, np.uint8)
    self = "/bert/encoder/layer.0/attention/self"
    for name in (f"{self}/MatMul_1_output_0", f"{self}/Transpose_3_output_0", f"{self}/Reshape_3_output_0"):
        assert found[name] == (pytest.approx(scale), zero, np.uint8)
    calibrated = onnx.load(lowered(made, tmp_path))
    other = scales(calibrated)[f"{self}/MatMul_1_output_0"]
    assert other[0] == pytest.approx(expected_scale(made.ranges[f"{self}/MatMul_1_output_0"], np.uint8)[0])
    assert other[0] != pytest.approx(scale, rel=1e-3)


def test_residual_sums_share_the_trained_scale_of_the_layer_that_reads_them(snapped: Any, tmp_path: Path) -> None:
    made = snapped("bert")
    query = "bert.encoder.layer.1.attention.self.query"
    spans = {query.replace("query", name): (-3.0, 3.5) for name in ("query", "key", "value")}
    graph = onnx.load(lowered(made, tmp_path, activations=spans))
    name = "/bert/encoder/layer.0/output/LayerNorm/LayerNormalization_output_0"
    pairs = [node for node in graph.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == name]
    assert len(pairs) == 1
    assert scales(graph)[name][0] == pytest.approx(6.5 / 255)


@pytest.mark.parametrize("bits", [8, 16])
def test_every_matrix_has_a_scale_for_every_output(snapped: Any, bits: int, tmp_path: Path) -> None:
    made = snapped("bert")
    form = "int8_qdq" if bits == 8 else "int16_qdq"
    for layer in quantized_layers(onnx.load(lowered(made, tmp_path, form))):
        assert layer.weight_scale.shape == (len(made.weights[layer.module]),)


def test_wide_layers_keep_16_bits_up_to_their_norm_and_say_the_truth_better(
    snapped: Any, make_texts: Any, tmp_path: Path
) -> None:
    made, texts = snapped("bert"), make_texts(8)
    # An outlier in the residual stream takes the 8 bits from all else.
    block = "/bert/encoder/layer.1/output"
    ranges = {**made.ranges}
    for name in (f"{block}/dense/MatMul_output_0", f"{block}/dense/Add_output_0", f"{block}/Add_output_0"):
        ranges[name] = tuple(40 * end for end in ranges[name])
    narrow = lowered(made, tmp_path, ranges=ranges)
    before = blame(made.graph, narrow, texts)
    assert before.first is not None
    assert before.first.module == DENSE
    wide = lowered(made, tmp_path, ranges=ranges, keep_float=(DENSE,))
    assert blame(made.graph, wide, texts).first is None
    found = scales(onnx.load(wide))
    assert found[f"{block}/Add_output_0"][2] == np.uint16
    norm = f"{block}/LayerNorm/LayerNormalization_output_0"
    assert found[norm][2] == np.uint16
    others = {name: kind for name, (_, _, kind) in found.items() if not name.startswith((block, "gemm_", norm))}
    assert set(others.values()) == {np.dtype(np.uint8), np.dtype(np.uint16)}  # some are widened for it, some narrowed
    assert found["/bert/encoder/layer.1/attention/self/Softmax_output_0"][2] == np.uint8
    assert check_scales(wide, made.weights).mismatches == ()
    close = np.abs(onnx_logits(wide, texts) - onnx_logits(made.graph, texts)).mean()
    assert close < np.abs(onnx_logits(narrow, texts) - onnx_logits(made.graph, texts)).mean()


def test_nodes_compute_with_the_bits_of_their_output(snapped: Any) -> None:
    made = snapped("bert")
    graph = onnx.shape_inference.infer_shapes(simplify(onnx.load(made.graph), opset=21))
    wide = wide_tensors(graph, (DENSE,))
    sums = "/bert/encoder/layer.1/output/Add_output_0"
    norm = "/bert/encoder/layer.1/output/LayerNorm/LayerNormalization_output_0"
    assert {sums, norm} <= wide
    assert not any("layer.0" in name or "layer.2" in name for name in wide)
    told = overrides(graph, wide)
    readers = told[norm]["convert"]["recv_nodes"]
    assert {name.rpartition("/")[0].rpartition("/")[2] for name in readers} == {"query", "key", "value", "output"}
    assert "convert" not in told[sums]
    assert wide_tensors(graph, ()) == set()
    assert overrides(graph, ()) == {}


def test_layers_that_stay_float_beside_symmetric_ones(snapped: Any, tmp_path: Path) -> None:
    made = snapped("bert")
    file = lowered(made, tmp_path, symmetric=True, keep_float=(DENSE,), activations=made.spans)
    check = check_scales(file, made.weights, made.spans)
    assert check.floating == (DENSE,)
    assert check.mismatches == ()
    with pytest.raises(ModelError, match="keep_float names what the graph has not"):
        lowered(made, tmp_path, keep_float=("bert.nowhere",))


def test_factors_are_folded_only_where_nothing_else_sees_the_difference(snapped: Any, make_texts: Any) -> None:
    graph = simplify(fix_shapes(onnx.load(snapped("bert").graph), sequence=LENGTH), opset=21)
    before = sum(node.op_type == "Mul" for node in graph.graph.node)
    shared = next(node for node in graph.graph.node if node.name.endswith("layer.0/attention/self/query/MatMul"))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(shared.output[0], TensorProto.FLOAT, [1, LENGTH, 32]))
    known = {name: (-1.0, 2.0) for node in graph.graph.node for name in node.output}
    changed = fold_factors(graph, known)
    assert before - sum(node.op_type == "Mul" for node in graph.graph.node) == len(factors_of(graph)) == 5
    assert all(pair == (pytest.approx(-(8**-0.25)), pytest.approx(2 * 8**-0.25)) for pair in changed.values())
    assert not set(changed) & set(known)
    onnx.checker.check_model(graph)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_the_folded_graph_says_the_same(
    snapped: Any, make_texts: Any, make_images: Any, kind: str, tmp_path: Path
) -> None:
    made = snapped(kind)
    examples = make_images(4) if kind == "vit" else make_texts(4, typed=kind == "bert")
    graph = simplify(fix_shapes(onnx.load(made.graph), sequence=LENGTH), opset=21)
    expected = onnx_logits(made.graph, examples)
    fold_factors(graph, {})
    onnx.save(graph, tmp_path / "folded.onnx")
    assert factors_of(graph)
    np.testing.assert_allclose(onnx_logits(tmp_path / "folded.onnx", examples), expected, atol=1e-4)


@pytest.mark.device
@pytest.mark.parametrize("kept", [(), (DENSE,)])
def test_qualcomms_compiler_takes_and_costs_every_operator(snapped: Any, kept: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    from edgekd.devices import compiler_of
    from edgekd.target import load_target, probe

    target, made = probe(load_target("npu-qualcomm-qcs9100")), snapped("bert")
    file = lowered(made, tmp_path, activations=made.spans, keep_float=kept)
    (tmp_path / "out").mkdir()
    found = compiler_of(target).compile(target, file, tmp_path / "out", timeout=600)
    assert found.ms > 0
    assert [value for name, value in found.figures.items() if name.startswith("Missing Ops")] == [0.0]
