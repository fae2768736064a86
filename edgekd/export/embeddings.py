"""Embedding tables in 8 bits with a scale for every row: a quarter of the bytes, and each token keeps its own range."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.export.rewrite import add_tensors, attribute, exchange, initializers, sort_nodes
from edgekd.export.static import drop_unused

LEVELS = 127
LEAST_ROWS = 16
"""A table with fewer rows, such as that of token types, is not worth three operators."""


def quantize_rows(table: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Integers `[V, D]` and a scale for every row `[V, 1]`: max|w| / 127, zero point 0.

    A table that lies on such a grid already is given back by `integers * scale`, bit for bit.
    """
    largest = np.abs(table).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(table / scale), -LEVELS, LEVELS).astype(np.int8), scale


def integer_tables(graph: Any, *, kept: Collection[str] = ()) -> int:
    """Store float tables that tokens or positions pick rows of as integers, in place; return how many there are.

    Only the picked rows are turned back into floats. A table that something else reads too stays float.

    Args:
        graph: float32 ModelProto, changed in place.
        kept: names of nodes whose table stays float.
    """
    from onnx import TensorProto, numpy_helper

    tables = {
        name: tensor
        for name, tensor in initializers(graph).items()
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[0] >= LEAST_ROWS
    }
    readers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            if name in tables:
                readers.setdefault(name, []).append(node)
    count, made, gone = 0, [], []
    for name, nodes in readers.items():
        if all(_picks(node, name) and node.name not in kept for node in nodes):
            count += 1
            integers, scales = quantize_rows(numpy_helper.to_array(tables[name]))
            add_tensors(graph, {f"{name}_quantized": integers, f"{name}_scale": scales})
            made += [step for node in nodes for step in _rows(name, node)]
            gone += nodes
    exchange(graph, made, gone)
    drop_unused(sort_nodes(graph))
    return count


def _rows(table: str, node: Any) -> list[Any]:
    """Pick integers and scales of rows, and multiply them."""
    from onnx import TensorProto, helper

    rows, out = node.input[1], node.output[0]
    return [
        helper.make_node("Gather", [f"{table}_quantized", rows], [f"{out}_integers"], node.name, axis=0),
        helper.make_node("Gather", [f"{table}_scale", rows], [f"{out}_scale"], f"{out}_scale/Gather", axis=0),
        helper.make_node("Cast", [f"{out}_integers"], [f"{out}_float"], f"{out}_float/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out], f"{out}_rows/Mul"),
    ]


def _picks(node: Any, table: str) -> bool:
    return bool(node.op_type == "Gather" and node.input[0] == table and attribute(node, "axis", 0) == 0)
