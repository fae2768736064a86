"""Layers that keep fewer tokens, in fewer operators: exporters write every step of the choice out."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.export.rewrite import add_tensors, attribute, sort_nodes, uses
from edgekd.export.sizes import Sizes
from edgekd.export.static import drop_unused

LAST, INNER = "edgekd_last_axis", "edgekd_inner_axes"


def shorten_choices(graph: Any) -> int:
    """Pick rows and mask entries of chosen tokens by fewer operators, in place; return how many places changed.

    Rows `[B * S, D]` at places that are worked out from the batch become a `GatherND` within each example, and a mask
    that is widened to `[B, 1, 1, S]` and narrowed again is read before it is widened. The values stay the same.
    """
    sizes = Sizes(graph)
    made: list[Any] = []
    changed = sum(
        _pick(node, sizes, made) or _narrow(node, sizes, graph) or _widen(node, sizes, graph)
        for node in graph.graph.node
    )
    if changed:
        add_tensors(graph, {LAST: np.array([-1], np.int64), INNER: np.array([1, 2], np.int64)})
        graph.graph.node.extend(made)
        drop_unused(sort_nodes(graph))
    return changed


def _pick(node: Any, sizes: Sizes, made: list[Any]) -> bool:
    """Gather rows of `[B * S, D]` at `chosen + first row of the example`."""
    from onnx import helper

    if node.op_type != "Gather" or attribute(node, "axis", 0) != 0:
        return False
    flat, total = (sizes.makers.get(name) for name in node.input)
    if flat is None or total is None or flat.op_type != "Reshape" or total.op_type != "Add":
        return False
    states, width = flat.input[0], sizes.shapes.get(flat.output[0], ())[-1:]
    sides = [name for name in total.input if not _is_first_rows(name, sizes)]
    if len(sides) != 1 or len(sizes.shapes.get(states, ())) != 3 or sizes.shapes[states][-1:] != width:
        return False
    places = f"{sides[0]}_edgekd_places"
    if all(places not in other.output for other in made):
        made.append(helper.make_node("Unsqueeze", [sides[0], LAST], [places], f"{places}/Unsqueeze"))
    node.op_type = "GatherND"
    node.input[:] = [states, places]
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("batch_dims", 1))
    return True


def _is_first_rows(name: str, sizes: Sizes) -> bool:
    """`[[0], [S], [2 S], …]`: a Range up to the product of two sizes."""
    for kind in ("Unsqueeze", "Range"):
        node = sizes.makers.get(name)
        if node is None or node.op_type != kind:
            return False
        name = node.input[1 if kind == "Range" else 0]
    limit = sizes.makers.get(name)
    return limit is not None and limit.op_type == "ReduceProd"


def _narrow(node: Any, sizes: Sizes, graph: Any) -> bool:
    """The first of the only rows of what was two-dimensional before."""
    wide = node
    for _ in range(2):
        if wide is None or wide.op_type != "Gather" or attribute(wide, "axis", 0) != 1 or _index(wide, sizes) != 0:
            return False
        wide = sizes.makers.get(wide.input[0])
    if wide is None or len(source := _unwidened(wide, sizes)) == 0:
        return False
    for other in graph.graph.node:
        other.input[:] = [source if name == node.output[0] else name for name in other.input]
    return not any(value.name == node.output[0] for value in graph.graph.output)


def _widen(node: Any, sizes: Sizes, graph: Any) -> bool:
    """Two Unsqueeze in a row."""
    source = _unwidened(node, sizes)
    if not source or node.input[0] == source or uses(graph)[node.input[0]] != 1:
        return False
    node.input[:] = [source, INNER]
    return True


def _unwidened(node: Any, sizes: Sizes) -> str:
    """The tensor `[B, S]` that two Unsqueeze have made `[B, 1, 1, S]`, or an empty string."""
    if node.op_type != "Unsqueeze" or sizes.shapes.get(node.output[0], ())[1:3] != (1, 1):
        return ""
    inner = sizes.makers.get(node.input[0])
    both = inner is not None and inner.op_type == "Unsqueeze" and len(sizes.shapes.get(inner.input[0], ())) == 2
    return str(inner.input[0]) if both and inner is not None else ""


def _index(node: Any, sizes: Sizes) -> float | None:
    return sizes.scalar(node.input[1])
