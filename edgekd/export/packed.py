"""Projections of the same tensor as one matrix product: query, key and value of an attention layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class _Projection:
    """`x @ weight [in, out] + bias [out]`, in a MatMul and an Add node."""

    product: Any
    total: Any
    weight: np.ndarray
    bias: np.ndarray


def pack_projections(graph: Any) -> int:
    """Write projections of one tensor as a MatMul, an Add and a Split, in place; return how many products are gone.

    Only products with constant matrices whose result goes into an Add of a constant vector and nowhere else are
    taken; every output is computed by the same sums of the same numbers.
    """
    from onnx import helper, numpy_helper

    groups = [group for group in _groups(graph) if len(group) > 1]
    for index, group in enumerate(groups):
        name = f"packed_{index}"
        tensors = {
            f"{name}_weight": np.concatenate([part.weight for part in group], axis=1),
            f"{name}_bias": np.concatenate([part.bias for part in group]),
            f"{name}_sizes": np.array([len(part.bias) for part in group], dtype=np.int64),
        }
        graph.graph.initializer.extend([numpy_helper.from_array(value, key) for key, value in tensors.items()])
        source, outputs = group[0].product.input[0], [part.total.output[0] for part in group]
        made = [
            helper.make_node("MatMul", [source, f"{name}_weight"], [f"{name}_product"], name=f"{name}/MatMul"),
            helper.make_node("Add", [f"{name}_product", f"{name}_bias"], [f"{name}_total"], name=f"{name}/Add"),
            helper.make_node("Split", [f"{name}_total", f"{name}_sizes"], outputs, name=f"{name}/Split", axis=-1),
        ]
        _replace(graph, made, [node for part in group for node in (part.product, part.total)])
    _drop_tensors(graph)
    return sum(len(group) - 1 for group in groups)


def _groups(graph: Any) -> list[list[_Projection]]:
    """Projections by the tensor they read, in the order of the graph."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    uses = Counter(name for node in graph.graph.node for name in node.input)
    uses.update(value.name for value in graph.graph.output)
    adds = {name: node for node in graph.graph.node if node.op_type == "Add" for name in node.input}
    found: dict[str, list[_Projection]] = defaultdict(list)
    for node in graph.graph.node:
        total = adds.get(node.output[0]) if node.op_type == "MatMul" else None
        if total is None or node.input[1] not in constants or uses[node.output[0]] != 1:
            continue
        other = total.input[1] if total.input[0] == node.output[0] else total.input[0]
        matrix = constants[node.input[1]]
        if other in constants and list(constants[other].dims) == [matrix.dims[-1]] and len(matrix.dims) == 2:
            weight, bias = (numpy_helper.to_array(constants[name]) for name in (node.input[1], other))
            found[node.input[0]].append(_Projection(node, total, weight, bias))
    return list(found.values())


def _replace(graph: Any, made: list[Any], gone: list[Any]) -> None:
    """Put nodes where the first of those that go was."""
    names = {node.output[0] for node in gone}
    nodes: list[Any] = []
    place = None
    for node in graph.graph.node:
        if node.output and node.output[0] in names:
            if place is None:
                place = len(nodes)
                nodes.extend(made)
            continue
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _drop_tensors(graph: Any) -> None:
    used = {name for node in graph.graph.node for name in node.input} | {value.name for value in graph.graph.output}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
