"""Embedding tables in 8 bits with a scale for every row, or in 4 with one for every few values of a row."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.export.matmul_nbits import DOMAIN, block_size, pack
from edgekd.export.nbits import TABLE_GRID, grid_of, round_to
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


def pack_rows(table: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """Two integers of 4 bits a byte `[V, D / 2]` and a scale for every 32 of them `[V, ceil(D / 32)]`: max|w| / 7.

    Scales are rounded to half precision before the weights are rounded to them.
    """
    scales, zeros = grid_of(table, TABLE_GRID)
    least, most = np.finfo(np.float16).smallest_subnormal, np.finfo(np.float16).max
    halves = np.clip(scales, least, most).astype(np.float16)
    values, exact, _ = pack(round_to(table, halves.astype(np.float32), zeros, TABLE_GRID), TABLE_GRID)
    return values.reshape(len(table), -1)[:, : table.shape[1] // 2], np.clip(exact, least, most).astype(np.float16)


def integer_tables(graph: Any, *, kept: Collection[str] = (), bits: int = 8) -> int:
    """Store float tables that tokens or positions pick rows of as integers, in place; return how many there are.

    Only the picked rows are turned back into floats. A table that something else reads too stays float.

    Args:
        graph: float32 ModelProto, changed in place.
        kept: names of nodes whose table stays float.
        bits: 8, with a scale for every row; 4, with one for every 32 values, or 0: all stay float. A table of odd
            width keeps 8.
    """
    from onnx import TensorProto, numpy_helper

    if not bits:
        return 0
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
            table = numpy_helper.to_array(tables[name])
            packs = bits == 4 and table.shape[1] % 2 == 0
            integers, scales = pack_rows(table) if packs else quantize_rows(table)
            add_tensors(graph, {f"{name}_quantized": integers, f"{name}_scale": scales})
            steps = _unpacked(name, table.shape[1]) if packs else _rows(name)
            made += [step for node in nodes for step in steps(node)]
            gone += nodes
    exchange(graph, made, gone)
    drop_unused(sort_nodes(graph))
    return count


def _rows(table: str) -> Callable[[Any], list[Any]]:
    """Pick integers and scales of rows, and multiply them."""
    from onnx import TensorProto, helper

    def steps(node: Any) -> list[Any]:
        rows, out = node.input[1], node.output[0]
        return [
            helper.make_node("Gather", [f"{table}_quantized", rows], [f"{out}_integers"], node.name, axis=0),
            helper.make_node("Gather", [f"{table}_scale", rows], [f"{out}_scale"], f"{out}_scale/Gather", axis=0),
            helper.make_node("Cast", [f"{out}_integers"], [f"{out}_float"], f"{out}_float/Cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out], f"{out}_rows/Mul"),
        ]

    return steps


def _unpacked(table: str, width: int) -> Callable[[Any], list[Any]]:
    """Pick rows of 4-bit integers as half precision, and widen them."""
    from onnx import TensorProto, helper

    def steps(node: Any) -> list[Any]:
        out = node.output[0]
        names = [f"{table}_quantized", node.input[1], f"{table}_scale"]
        layout = {"bits": 4, "block_size": block_size(TABLE_GRID, width), "gather_axis": 0, "quantize_axis": 1}
        return [
            helper.make_node("GatherBlockQuantized", names, [f"{out}_half"], node.name, domain=DOMAIN, **layout),
            helper.make_node("Cast", [f"{out}_half"], [out], f"{out}_float/Cast", to=TensorProto.FLOAT),
        ]

    return steps


def _picks(node: Any, table: str) -> bool:
    return bool(node.op_type == "Gather" and node.input[0] == table and attribute(node, "axis", 0) == 0)
