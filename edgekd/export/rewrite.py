"""Taking nodes out of a graph and putting others in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    from onnx import helper

    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def initializers(graph: Any) -> dict[str, Any]:
    """TensorProto by name."""
    return {tensor.name: tensor for tensor in graph.graph.initializer}


def add_tensors(graph: Any, tensors: Mapping[str, Array]) -> None:
    """Add initializers, but for those whose name is there already."""
    from onnx import numpy_helper

    there = {tensor.name for tensor in graph.graph.initializer}
    new = [
        numpy_helper.from_array(np.array(value, order="C"), name)
        for name, value in tensors.items()
        if name not in there
    ]
    graph.graph.initializer.extend(new)


def uses(graph: Any) -> Counter[str]:
    """How many inputs of nodes and outputs of the graph each tensor is."""
    found = Counter(name for node in graph.graph.node for name in node.input)
    found.update(value.name for value in graph.graph.output)
    return found


def exchange(graph: Any, made: Sequence[Any], gone: Collection[Any]) -> None:
    """Put nodes in the place of others; `sort_nodes` brings them into order afterwards."""
    outputs = {node.output[0] for node in gone}
    kept = [node for node in graph.graph.node if not node.output or node.output[0] not in outputs]
    del graph.graph.node[:]
    graph.graph.node.extend([*kept, *made])


def sort_nodes(graph: Any) -> Any:
    """Order nodes, in place, so that each comes after what it reads, else as they were; return the graph.

    Raises:
        ValueError: there is a loop.
    """
    left = list(graph.graph.node)
    made = {name for node in left for name in node.output}
    ready: set[str] = {""}
    order: list[Any] = []
    while left:
        rest = []
        for node in left:
            if all(name in ready or name not in made for name in _read(node)):
                order.append(node)
                ready.update(node.output)
            else:
                rest.append(node)
        if len(rest) == len(left):
            raise ValueError(f"the graph has a loop through {rest[0].name or rest[0].op_type}")
        left = rest
    copies = [_copy(node) for node in order]
    del graph.graph.node[:]
    graph.graph.node.extend(copies)
    return graph


def _read(node: Any) -> list[str]:
    """What a node reads, the nodes of its branches and loops too."""
    inner = [step for item in node.attribute if item.HasField("g") for step in item.g.node]
    return [*node.input, *(name for step in inner for name in _read(step))]


def _copy(node: Any) -> Any:
    made = type(node)()
    made.CopyFrom(node)
    return made
