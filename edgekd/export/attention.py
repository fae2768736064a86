"""Attention as the one operator that ONNX has for it since version 23 of its operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.export.rewrite import add_tensors, attribute, exchange, sort_nodes, uses
from edgekd.export.sizes import Sizes

OPSET = 23
"""ONNX Runtime has a CPU kernel of its Attention since 1.23."""
SPLIT = [0, 2, 1, 3]
"""`[B, S, heads, head_dim]` <-> `[B, heads, S, head_dim]`."""
KEYS = [0, 2, 3, 1]
ONES = "edgekd_ones"
ROWWISE = ("MatMul", "Add", "Sum", "LayerNormalization", "Gelu", "FastGelu", "QuickGelu", "Attention", "Mul", "Relu")
"""Operators that keep the rows of what they read first."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """Scores, softmax and context of one layer: what it reads, `[B, S, heads * head_dim]`, and which nodes it is.

    `mask` is added to the scores, empty if there is none.
    """

    query: str
    key: str
    value: str
    mask: str
    heads: int
    scale: float
    context: str
    nodes: tuple[Any, ...]


def fuse_attention(graph: Any) -> int:
    """Write every attention as an `Attention` node over 3-dimensional query, key and value; return how many there are.

    The operator does not stretch a mask over the queries: `stretch_masks` must follow.

    Args:
        graph: ModelProto with version 23 of the standard operators, changed in place.
    """
    cores = list(find_cores(graph, Sizes(graph)))
    for core in cores:
        exchange(graph, [_node(core)], core.nodes)
    sort_nodes(graph)
    return len(cores)


def find_cores(graph: Any, sizes: Sizes) -> Iterator[Core]:
    """Every attention whose parts are as exporters write them; others are left as they are."""
    readers = uses(graph)
    after = {name: node for node in graph.graph.node for name in node.input}
    for node in graph.graph.node:
        if node.op_type == "Softmax" and attribute(node, "axis", -1) in (-1, 3):
            found = _core(node, sizes, readers, after)
            if found is not None:
                yield found


def _core(softmax: Any, sizes: Sizes, readers: Counter[str], after: dict[str, Any]) -> Core | None:
    probabilities = softmax.output[0]
    # The operator could give the probabilities out, but shape inference then takes them for empty (onnx 1.23).
    products = [after[probabilities]] if readers[probabilities] == 1 else []
    scores = _scores(softmax.input[0], sizes)
    if not products or products[0].op_type != "MatMul" or products[0].input[0] != probabilities or scores is None:
        return None
    product, scale, mask, above = scores
    below = _below(products[0], readers, after)
    sides = [_side(name, sizes) for name in (product.input[0], product.input[1], products[0].input[1])]
    if below is None or any(side is None for side in sides):
        return None
    query, key, value = (side for side in sides if side is not None)
    if (query.moved, key.moved, value.moved) != (SPLIT, KEYS, SPLIT) or value.scale != 1.0:
        return None
    if len({query.heads, key.heads, value.heads}) != 1 or query.width != key.width:
        return None
    own, context = [*above, softmax, products[0], *below], below[-1].output[0]
    if len(sizes.shapes.get(context, ())) != 3:
        # The optimizer has put another Reshape behind; it reads the same numbers in the same order.
        own, context = own[:-1], below[0].output[0]
    inner = {name for n in own for name in n.output} - {context}
    if any(readers[name] != 1 for name in inner):
        return None
    return Core(
        query=query.source,
        key=key.source,
        value=value.source,
        mask=mask,
        heads=query.heads,
        scale=scale * query.scale * key.scale,
        context=context,
        nodes=tuple(own),
    )


def _scores(name: str, sizes: Sizes) -> tuple[Any, float, str, list[Any]] | None:
    """The product of query and key under a softmax, its factor, the mask that is added, and the nodes between."""
    scale, mask, nodes = 1.0, "", []
    for _ in range(4):
        node = sizes.makers.get(name)
        if node is None:
            return None
        nodes.append(node)
        if node.op_type == "MatMul":
            return node, scale, mask, nodes
        factor = _factor(node, sizes)
        if factor is not None:
            scale, name = scale * factor[1], factor[0]
        elif node.op_type == "Add" and not mask and scale == 1.0:
            sources = [_leads_to_product(side, sizes) for side in node.input]
            if sources.count(True) != 1:
                return None
            name, mask = (node.input[0], node.input[1]) if sources[0] else (node.input[1], node.input[0])
        else:
            return None
    return None


def _leads_to_product(name: str, sizes: Sizes) -> bool:
    for _ in range(3):
        node = sizes.makers.get(name)
        if node is None:
            return False
        if node.op_type == "MatMul":
            return True
        factor = _factor(node, sizes)
        if factor is None:
            return False
        name = factor[0]
    return False


def _factor(node: Any, sizes: Sizes) -> tuple[str, float] | None:
    """What a Mul or Div by a known number reads, and the factor."""
    if node.op_type not in ("Mul", "Div"):
        return None
    left, right = (sizes.scalar(name) for name in node.input)
    if right is not None and left is None:
        return node.input[0], right if node.op_type == "Mul" else 1.0 / right
    if left is not None and right is None and node.op_type == "Mul":
        return node.input[1], left
    return None


@dataclass(frozen=True)
class _Side:
    source: str
    moved: list[int]
    scale: float
    heads: int
    width: int


def _side(name: str, sizes: Sizes) -> _Side | None:
    """From what a product reads back to the tensor `[B, S, heads * head_dim]`, over scales, transposes, a reshape."""
    moved, scale = [0, 1, 2, 3], 1.0
    for _ in range(5):
        node = sizes.makers.get(name)
        if node is None:
            return None
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", None)
            if perm is None or len(perm) != 4:
                return None
            moved, name = [perm[axis] for axis in moved], node.input[0]
        elif (factor := _factor(node, sizes)) is not None:
            scale, name = scale * factor[1], factor[0]
        elif node.op_type == "Reshape":
            split, whole = sizes.shapes.get(name, ()), sizes.shapes.get(node.input[0], ())
            if len(split) != 4 or len(whole) != 3 or not all(isinstance(size, int) for size in split[2:]):
                return None
            heads, width = int(split[2]), int(split[3])
            return _Side(node.input[0], moved, scale, heads, width) if whole[2] == heads * width else None
        else:
            return None
    return None


def _below(product: Any, readers: Counter[str], after: dict[str, Any]) -> list[Any] | None:
    """The Transpose and the Reshape that join the heads again."""
    nodes, name = [], product.output[0]
    for kind in ("Transpose", "Reshape"):
        node = after.get(name)
        if readers[name] != 1 or node is None or node.op_type != kind:
            return None
        nodes.append(node)
        name = node.output[0]
    return nodes if attribute(nodes[0], "perm", None) == SPLIT else None


def _node(core: Core) -> Any:
    from onnx import helper

    given = [core.query, core.key, core.value, *([core.mask] if core.mask else [])]
    return helper.make_node(
        "Attention", given, [core.context], core.context.removesuffix("_output_0"),
        q_num_heads=core.heads, kv_num_heads=core.heads, scale=core.scale,
    )  # fmt: skip


def stretch_masks(graph: Any) -> None:
    """Give masks a row for every query, once for all layers with the same mask and as many queries."""
    from onnx import helper

    sizes = Sizes(graph)
    made: list[Any] = []
    masks: dict[tuple[str, str], str] = {}
    for node in graph.graph.node:
        if node.op_type != "Attention" or len(node.input) < 4:
            continue
        query, mask = node.input[0], node.input[3]
        rows, shape = _rows(query, sizes), sizes.shapes.get(mask, ())
        if len(shape) == 4 and shape[2] == sizes.shapes[query][1]:
            continue
        if (mask, rows) not in masks:
            name = masks[mask, rows] = f"{node.output[0]}_edgekd_mask"
            parts = [ONES, ONES, f"{name}_rows", ONES]
            made += [
                helper.make_node("Shape", [query], [f"{name}_rows"], f"{name}/Shape", start=1, end=2),
                helper.make_node("Concat", parts, [f"{name}_shape"], f"{name}/Concat", axis=0),
                helper.make_node("Expand", [mask, f"{name}_shape"], [name], f"{name}/Expand"),
            ]
        node.input[3] = masks[mask, rows]
    if made:
        add_tensors(graph, {ONES: np.ones(1, np.int64)})
        graph.graph.node.extend(made)
        sort_nodes(graph)


def _rows(name: str, sizes: Sizes) -> str:
    """The tensor that has told how many rows there are: shape inference renames free sizes at every broadcast."""
    node = sizes.makers.get(name)
    while node is not None and node.op_type in ROWWISE:
        wide = [given for given in node.input if len(sizes.shapes.get(given, ())) == 3 and given in sizes.makers]
        if not wide:
            break
        name = wide[0]
        node = sizes.makers.get(name)
    return name
