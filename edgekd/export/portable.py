"""8 bits in standard operators, which every runtime of ONNX knows: integer products, or Q/DQ pairs to be fused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.export.embeddings import integer_tables
from edgekd.export.integer import Linear, find_linears, quantization_of, quantize_weight
from edgekd.export.quantizer import insert_pairs
from edgekd.export.rewrite import add_tensors, exchange, sort_nodes
from edgekd.export.static import drop_unused

Spans = Mapping[str, tuple[float, float]]


def dynamic(graph: Any, scratch: Path, *, kept: Collection[str] = (), table_bits: int = 8) -> Any:
    """Integer products by onnxruntime's quantizer, activations by their own minimum and maximum at every run.

    Args:
        graph: float32 ModelProto, perhaps with onnxruntime's fused attention; it may be changed.
        scratch: an existing folder for passing files.
        kept: names of nodes that stay float.
        table_bits: see `integer_tables`.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    tables = [node.name for node in graph.graph.node if node.op_type == "Gather"]
    target = scratch / "dynamic.onnx"
    quantize_dynamic(
        graph,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        # A Gemm becomes a MatMul of this name before names are looked at.
        nodes_to_exclude=[*kept, *(f"{name}_MatMul" for name in kept), *tables],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    made = onnx.load(target)
    integer_tables(made, kept=kept, bits=table_bits)
    return made


def static(
    graph: Any,
    scratch: Path,
    *,
    ranges: Spans,
    spans: Spans,
    kept: Collection[str] = (),
    table_bits: int = 8,
) -> Any:
    """Q/DQ pairs with given scales before linear layers and around convolutions; all else stays float.

    Args:
        graph: float32 ModelProto; it may be changed.
        scratch: an existing folder for passing files.
        ranges: minimum and maximum by tensor, for convolutions.
        spans: the same for the inputs of linear layers, by the name of their node; one without stays float.
        kept: names of nodes that stay float.
        table_bits: see `integer_tables`.
    """
    qdq_linears(graph, spans, kept=kept)
    if any(node.op_type == "Conv" for node in graph.graph.node):
        graph = _qdq_convolutions(graph, scratch, ranges, kept)
    integer_tables(graph, kept=kept, bits=table_bits)
    return graph


def qdq_linears(graph: Any, spans: Spans, *, kept: Collection[str] = ()) -> int:
    """Put a Q/DQ pair before every linear layer that has a range, in place; return how many layers that are.

    Only the product is rewired, not a residual addition that shares the tensor: one pair serves all layers that read
    a tensor with the same range. Weights are integers with a scale for every output and zero point 0.
    """
    pairs: dict[tuple[str, tuple[float, float]], str] = {}
    made: list[Any] = []
    gone: list[Any] = []
    linears = [linear for linear in find_linears(graph) if linear.name in spans and linear.name not in kept]
    for linear in linears:
        key = (linear.source, spans[linear.name])
        if key not in pairs:
            pairs[key] = _pair(graph, *key, len(pairs), made)
        made += _product(graph, linear, pairs[key])
        gone += linear.nodes
    exchange(graph, made, gone)
    drop_unused(sort_nodes(graph))
    return len(linears)


def _pair(graph: Any, tensor: str, span: tuple[float, float], number: int, made: list[Any]) -> str:
    from onnx import helper

    name = f"{tensor}_{number}"
    scale, zero = f"{name}_scale", f"{name}_zero_point"
    add_tensors(graph, dict(zip((scale, zero), quantization_of(*span), strict=True)))
    made += [
        helper.make_node("QuantizeLinear", [tensor, scale, zero], [f"{name}_quantized"], f"{name}_quantize"),
        helper.make_node(
            "DequantizeLinear", [f"{name}_quantized", scale, zero], [f"{name}_back"], f"{name}_dequantize"
        ),
    ]
    return f"{name}_back"


def _product(graph: Any, linear: Linear, source: str) -> list[Any]:
    from onnx import helper

    name = linear.name
    integers, scales = quantize_weight(linear.weight)
    weight = [f"{name}_weight_{part}" for part in ("quantized", "scale", "zero_point")]
    add_tensors(graph, dict(zip(weight, (integers, scales, np.zeros(scales.shape, np.int8)), strict=True)))
    product = linear.output if linear.bias is None else f"{linear.output}_product"
    nodes = [
        helper.make_node("DequantizeLinear", weight, [f"{name}_weight"], f"{name}_weight_dequantize", axis=1),
        helper.make_node("MatMul", [source, f"{name}_weight"], [product], name),
    ]
    if linear.bias is not None:
        add_tensors(graph, {f"{name}_bias": linear.bias})
        # At load, MatMul and Add of two dimensions would become a Gemm, and that would be computed in float.
        kind = "Sum" if linear.nodes[0].op_type == "Gemm" else "Add"
        nodes.append(helper.make_node(kind, [product, f"{name}_bias"], [linear.output], f"{name}_bias/{kind}"))
    return nodes


def _qdq_convolutions(graph: Any, scratch: Path, ranges: Spans, kept: Collection[str]) -> Any:
    """Convolutions by onnxruntime's quantizer, those only whose input and output have ranges."""
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    known = [node.name for node in convolutions if node.input[0] in ranges and node.output[0] in ranges]
    left = [node.name for node in convolutions if node.name not in known or node.name in kept]
    return insert_pairs(graph, ranges, scratch, ["Conv"], left=left)
