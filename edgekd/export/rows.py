"""Rows of the last layer that nobody reads: a head that takes the first token needs none of the others' outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgekd.export.rewrite import add_tensors, attribute, sort_nodes, uses
from edgekd.export.sizes import Sizes

ROWWISE = ("MatMul", "Add", "Sum", "Sub", "Mul", "Div", "LayerNormalization", "Gelu", "Erf", "Tanh", "Sigmoid", "Relu")
"""Operators that compute each row `[B, s, :]` of 3-dimensional tensors from the same row alone."""
FIRST, START, END, AXIS = (f"edgekd_first_{part}" for part in ("row", "start", "end", "axis"))


def keep_first_rows(graph: Any) -> dict[str, str]:
    """Compute only the first token wherever only the first is read, in place; the numbers stay the same.

    From a `Gather` of row 0 upwards, everything that works row by row and is read by nothing else gets one row;
    attention gets one query and all keys and values.

    Args:
        graph: ModelProto whose attentions are `Attention` nodes, changed in place.

    Returns:
        New tensors by the whole tensors whose first row they hold.
    """
    sizes = Sizes(graph)
    readers = uses(graph)
    picked: dict[str, str] = {}
    made: list[Any] = []
    for gather in list(_first_row(graph, sizes)):
        region = _region(gather.input[0], sizes, readers)
        inside = {name for node in region for name in node.output}
        for node in region:
            for index in _rows_read(node, sizes):
                name = node.input[index]
                if name not in inside:
                    node.input[index] = _first(name, picked, made)
            if node.op_type == "Attention" and len(node.input) > 3 and node.input[3]:
                node.input[3] = _first_of_mask(node.input[3], sizes, made)
    if made:
        tensors = {FIRST: [0], START: [0], END: [1], AXIS: [2]}
        add_tensors(graph, {name: np.array(value, np.int64) for name, value in tensors.items()})
        graph.graph.node.extend(made)
        sort_nodes(graph)
        _forget_shapes(graph)
    return picked


def _first_row(graph: Any, sizes: Sizes) -> Iterator[Any]:
    """Every Gather of row 0 of a tensor `[B, S, D]`."""
    for node in graph.graph.node:
        shape = sizes.shapes.get(node.input[0], ()) if node.op_type == "Gather" else ()
        if len(shape) == 3 and shape[1] != 1 and attribute(node, "axis", 0) == 1:
            index = sizes.value(node.input[1])
            if index is not None and index.size == 1 and int(index.reshape(-1)[0]) == 0:
                yield node


def _region(name: str, sizes: Sizes, readers: Any) -> list[Any]:
    """Nodes above a tensor, itself read once, that work by rows and are read only among themselves."""
    candidates: dict[str, Any] = {}
    waiting = [name] if readers[name] == 1 else []
    while waiting:
        node = sizes.makers.get(waiting.pop())
        if node is None or node.op_type not in (*ROWWISE, "Attention") or node.output[0] in candidates:
            continue
        if len([name for name in node.output if name]) > 1 or not _is_rowwise(node, sizes):
            continue
        candidates[node.output[0]] = node
        waiting += [node.input[index] for index in _rows_read(node, sizes)]
    # What another node reads too must stay whole, and so must what it is made of.
    while True:
        read = dict.fromkeys(candidates, 0)
        for node in candidates.values():
            for index in _rows_read(node, sizes):
                if node.input[index] in read:
                    read[node.input[index]] += 1
        out = [n for n in candidates if n != name and read[n] != readers[n]]
        if not out:
            return list(candidates.values())
        for n in out:
            del candidates[n]


def _is_rowwise(node: Any, sizes: Sizes) -> bool:
    shape = sizes.shapes.get(node.output[0], ())
    if len(shape) != 3:
        return False
    if node.op_type == "LayerNormalization":
        return attribute(node, "axis", -1) in (-1, 2)
    if node.op_type == "MatMul":
        return len(sizes.shapes.get(node.input[1], ())) == 2
    if node.op_type == "Attention":
        return len(sizes.shapes.get(node.input[0], ())) == 3 and not attribute(node, "is_causal", 0)
    # An operand with one row, or none, is the same for all rows and stays as it is.
    return all(len(sizes.shapes.get(name, (0, 0, 0, 0))) <= 3 for name in node.input)


def _rows_read(node: Any, sizes: Sizes) -> list[int]:
    """Which inputs of a node have the rows of its output."""
    if node.op_type in ("MatMul", "LayerNormalization", "Attention"):
        return [0]
    shapes = [sizes.shapes.get(name, ()) for name in node.input]
    return [index for index, shape in enumerate(shapes) if len(shape) == 3 and shape[1] != 1]


def _first(name: str, picked: dict[str, str], made: list[Any]) -> str:
    from onnx import helper

    if name not in picked:
        picked[name] = f"{name}_first"
        made.append(helper.make_node("Gather", [name, FIRST], [picked[name]], f"{name}_first/Gather", axis=1))
    return picked[name]


def _first_of_mask(name: str, sizes: Sizes, made: list[Any]) -> str:
    from onnx import helper

    shape = sizes.shapes.get(name, ())
    if len(shape) == 4 and shape[2] == 1:
        return name
    first = f"{name}_first"
    if all(first not in node.output for node in made):
        made.append(helper.make_node("Slice", [name, START, END, AXIS], [first], f"{first}/Slice"))
    return first


def _forget_shapes(graph: Any) -> None:
    """Intermediate shapes that were told before are no longer true."""
    del graph.graph.value_info[:]
