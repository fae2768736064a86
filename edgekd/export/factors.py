"""Factors of attention scores, computed into the weights before them: an NPU rounds once less and multiplies less."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.export.names import module_of
from edgekd.export.rewrite import initializers, uses

Range = tuple[float, float]

KEY = "edgekd.factors"
"""Entry of a graph's metadata: a JSON object of factors by the module whose weights hold them."""
MOVES = ("Reshape", "Transpose")


@dataclass(frozen=True)
class _Found:
    """A multiplication by `factor`, and what is computed before it and read by nothing else."""

    node: Any
    factor: float
    between: tuple[str, ...]
    linear: Any
    constants: tuple[str, ...]


def fold_factors(graph: Any, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Multiply the weight and bias of linear layers, in place, by the number their output is multiplied by.

    Exporters write scaled attention as query and key each times a number. Integers of symmetric weights stay the same,
    only their scales change. Tensors whose values change get a new name; the factors are noted in the graph's metadata.

    Args:
        graph: ModelProto with the weights as initializers, changed in place.
        ranges: minimum and maximum by tensor.

    Returns:
        The ranges of the tensors that were renamed.
    """
    from onnx import numpy_helper

    changed: dict[str, Range] = {}
    factors = factors_of(graph)
    for found in list(_candidates(graph)):
        tensors = initializers(graph)
        for name in found.constants:
            value = numpy_helper.to_array(tensors[name]) * np.float32(found.factor)
            tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
        names = {old: f"{old}_times" for old in found.between}
        for old, new in names.items():
            if old in ranges:
                low, high = sorted(end * found.factor for end in ranges[old])
                changed[new] = (low, high)
        last, product = found.between[0], found.node.output[0]
        graph.graph.node.remove(found.node)
        for node in graph.graph.node:
            for index, name in enumerate(node.output):
                node.output[index] = names.get(name, name)
            for index, name in enumerate(node.input):
                node.input[index] = names[last] if name == product else names.get(name, name)
        if module := module_of(found.linear):
            factors[module] = factors.get(module, 1.0) * found.factor
    _note(graph, factors)
    return changed


def factors_of(graph: Any) -> dict[str, float]:
    """What the weights of modules were multiplied by, as `fold_factors` noted it."""
    for entry in graph.metadata_props:
        if entry.key == KEY:
            return {str(name): float(value) for name, value in json.loads(entry.value).items()}
    return {}


def _note(graph: Any, factors: Mapping[str, float]) -> None:
    kept = [entry for entry in graph.metadata_props if entry.key != KEY]
    del graph.metadata_props[:]
    graph.metadata_props.extend(kept)
    if factors:
        graph.metadata_props.add(key=KEY, value=json.dumps(dict(factors)))


def _candidates(graph: Any) -> Iterator[_Found]:
    tensors, readers = initializers(graph), uses(graph)
    makers = {name: node for node in graph.graph.node for name in node.output}
    outputs = {value.name for value in graph.graph.output}
    for node in graph.graph.node:
        factor = _factor(node, tensors)
        if factor is None or node.output[0] in outputs:
            continue
        name = next(name for name in node.input if name not in tensors)
        between = []
        while name in makers and readers[name] == 1 and makers[name].op_type in MOVES:
            between.append(name)
            name = makers[name].input[0]
        if linear := _linear(name, makers, tensors, readers):
            product, constants, inner = linear
            yield _Found(node, factor, (*between, *inner), product, constants)


def _factor(node: Any, tensors: Mapping[str, Any]) -> float | None:
    """The number that a node multiplies a tensor by."""
    from onnx import TensorProto, numpy_helper

    known = [name for name in node.input if name in tensors] if node.op_type == "Mul" else []
    if len(known) != 1 or tensors[known[0]].data_type != TensorProto.FLOAT or np.prod(tensors[known[0]].dims) != 1:
        return None
    factor = float(numpy_helper.to_array(tensors[known[0]]).reshape(-1)[0])
    return factor if np.isfinite(factor) and factor != 0 else None


def _linear(
    name: str, makers: Mapping[str, Any], tensors: Mapping[str, Any], readers: Mapping[str, int]
) -> tuple[Any, tuple[str, ...], tuple[str, ...]] | None:
    """The product behind a tensor, its constants and the tensors it makes; None if anything else reads one of them."""
    node, inner, constants = makers.get(name), [name], []
    if node is not None and node.op_type == "Add":
        known = [side for side in node.input if side in tensors]
        if len(known) != 1:
            return None
        constants += known
        other = next(side for side in node.input if side not in tensors)
        node = makers.get(other)
        inner.append(other)
    if node is None or node.op_type not in ("MatMul", "Gemm") or node.input[1] not in tensors:
        return None
    constants += [side for side in node.input[1:] if side]
    if any(side not in tensors for side in constants) or any(readers[side] != 1 for side in (*inner, *constants)):
        return None
    return node, tuple(constants), tuple(inner)
