"""Linear layers in 8-bit integers, as ONNX Runtime computes them fastest: product, scales and bias in one operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.export.rewrite import add_tensors, attribute, exchange, initializers, sort_nodes, uses
from edgekd.export.static import drop_unused

Array = npt.NDArray[Any]
Spans = Mapping[str, tuple[float, float]]

CONTRIB = "com.microsoft"
LEVELS = 127
"""Weights lie in [-127, 127], zero point 0."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`source @ weight [in, out] + bias [out]`, in a MatMul and perhaps an Add, or a Gemm."""

    name: str
    source: str
    output: str
    weight: Array
    bias: Array | None
    nodes: tuple[Any, ...]


def find_linears(graph: Any) -> list[Linear]:
    """The products with constant matrices, with the constant vector that is added and goes nowhere else."""
    from onnx import numpy_helper

    constant = {name: numpy_helper.to_array(t) for name, t in initializers(graph).items() if len(t.dims) in (1, 2)}
    readers = uses(graph)
    adds = {name: node for node in graph.graph.node if node.op_type == "Add" for name in node.input}
    found = []
    for node in graph.graph.node:
        weight = constant.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            continue
        if node.op_type == "Gemm":
            linear = _gemm(node, weight, constant)
        else:
            total = adds.get(node.output[0]) if readers[node.output[0]] == 1 else None
            linear = _product(node, weight, total, constant)
        if linear is not None:
            found.append(linear)
    return found


def _gemm(node: Any, weight: Array, constant: Mapping[str, Array]) -> Linear | None:
    bias = constant.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)
    if not plain or (bias is None and len(node.input) > 2):
        return None
    weight = weight.T if attribute(node, "transB", 0) else weight
    return Linear(
        name=node.name, source=node.input[0], output=node.output[0], weight=weight, bias=bias, nodes=(node,)
    )  # fmt: skip


def _product(node: Any, weight: Array, total: Any, constant: Mapping[str, Array]) -> Linear:
    bias = None
    nodes: tuple[Any, ...] = (node,)
    if total is not None:
        bias = constant.get(total.input[1] if total.input[0] == node.output[0] else total.input[0])
        if bias is not None and bias.shape == (weight.shape[1],):
            nodes = (node, total)
        else:
            bias = None
    return Linear(
        name=node.name, source=node.input[0], output=nodes[-1].output[0], weight=weight, bias=bias, nodes=nodes
    )  # fmt: skip


def quantize_weight(weight: Array) -> tuple[Array, Array]:
    """Integers `[in, out]` (int8) and a scale for every output `[out]`: max|w| / 127, zero point 0.

    A weight that lies on such a grid already gets its own integers again.
    """
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(weight / scale), -LEVELS, LEVELS).astype(np.int8), scale


def quantization_of(low: float, high: float) -> tuple[Array, Array]:
    """Scale (float32) and zero point (uint8) of a range, which is widened to contain 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1)
    return np.array(scale, np.float32), np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)


def integer_linears(graph: Any, *, spans: Spans | None = None, kept: Collection[str] = ()) -> int:
    """Write linear layers as integer products in place; return how many there are.

    A tensor is quantized once for all layers that read it with the same range, or without one by its own minimum and
    maximum at every run.

    Args:
        graph: float32 ModelProto, changed in place.
        spans: minimum and maximum of what a layer reads, by the name of its node.
        kept: names of nodes that stay float.
    """
    from onnx import helper

    quantized: dict[tuple[str, tuple[float, float] | None], tuple[str, str, str]] = {}
    made: list[Any] = []
    gone: list[Any] = []
    linears = [linear for linear in find_linears(graph) if linear.name not in kept]
    for index, linear in enumerate(linears):
        name = linear.name or f"edgekd_linear_{index}"
        key = (linear.source, (spans or {}).get(linear.name))
        if key not in quantized:
            quantized[key] = _quantized(graph, *key, len(quantized), made)
        integers, scale, zero = quantized[key]
        weight, scales = quantize_weight(linear.weight)
        tensors = {f"{name}_weight_quantized": weight, f"{name}_weight_scale": scales}
        given = [integers, f"{name}_weight_quantized", scale, f"{name}_weight_scale", zero]
        if linear.bias is not None:
            tensors[f"{name}_bias"] = linear.bias
            given += ["", f"{name}_bias"]
        add_tensors(graph, tensors)
        made.append(helper.make_node("MatMulIntegerToFloat", given, [linear.output], name, domain=CONTRIB))
        gone += linear.nodes
    exchange(graph, made, gone)
    drop_unused(sort_nodes(graph))
    return len(linears)


def _quantized(
    graph: Any, tensor: str, span: tuple[float, float] | None, number: int, made: list[Any]
) -> tuple[str, str, str]:
    """Names of the integers, the scale and the zero point of a tensor; the node that makes them is added to `made`."""
    from onnx import helper

    name = f"{tensor}_{number}"
    names = (f"{name}_quantized", f"{name}_scale", f"{name}_zero_point")
    if span is None:
        made.append(helper.make_node("DynamicQuantizeLinear", [tensor], names, f"{name}_quantize"))
    else:
        add_tensors(graph, dict(zip(names[1:], quantization_of(*span), strict=True)))
        # The standard operator has a kernel in version 23 of the operators only since ONNX Runtime 1.24.
        given = [tensor, *names[1:]]
        made.append(helper.make_node("QuantizeLinear", given, names[:1], f"{name}_quantize", domain=CONTRIB))
    return names
