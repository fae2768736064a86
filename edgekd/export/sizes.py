"""What a graph works out from the sizes of tensors, as far as it is known before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.export.rewrite import add_tensors, attribute
from edgekd.export.static import drop_unused, infer_types

Array = npt.NDArray[Any]

LARGEST = 16
"""Tensors with more numbers than this are no sizes."""
MOVES = ("Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Reshape")


class Sizes:
    """Shapes of tensors, and the values of small ones that follow from shapes.

    A size that is not known is a name: that of the free dimension, or one of its own.
    """

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        typed = infer_types(graph)
        self.shapes = {v.name: _shape(v) for v in (*typed.value_info, *typed.input, *typed.output)}
        self.shapes |= {t.name: tuple(t.dims) for t in graph.graph.initializer}
        self.makers = {name: node for node in graph.graph.node for name in node.output}
        small = [t for t in graph.graph.initializer if int(np.prod(t.dims)) <= LARGEST]
        self._known: dict[str, Array | None] = {t.name: numpy_helper.to_array(t) for t in small}

    def value(self, name: str) -> Array | None:
        """The value of a small tensor, in which unknown sizes are names; None if nothing is known."""
        if name not in self._known:
            self._known[name] = None  # a loop would end here
            node = self.makers.get(name)
            self._known[name] = None if node is None else self._worked_out(node)
        return self._known[name]

    def scalar(self, name: str) -> float | None:
        """The single number that a tensor holds, if it is known."""
        value = self.value(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 and is_known(value) else None

    def _worked_out(self, node: Any) -> Array | None:
        if node.op_type == "Constant":
            return _constant(node)
        if node.op_type == "Shape":
            return self._sizes(node)
        values = [self.value(name) for name in node.input]
        known = [value for value in values if value is not None]
        if len(known) != len(values) or not values:
            return None
        rule = RULES.get(node.op_type)
        if rule is None or (node.op_type not in MOVES and not all(is_known(value) for value in known)):
            return None
        try:
            return rule(node, known)
        except (TypeError, ValueError, IndexError):
            return None

    def _sizes(self, node: Any) -> Array | None:
        shape = self.shapes.get(node.input[0])
        if not shape:
            return None
        start, end = (attribute(node, key, None) for key in ("start", "end"))
        made = np.empty(len(shape), object)
        made[:] = shape
        return made[start:end]


def is_known(value: Array) -> bool:
    """Whether no number of a value is missing."""
    return not any(isinstance(item, str) for item in value.reshape(-1)) if value.dtype == object else True


def fold_sizes(graph: Any) -> Any:
    """Put constants where a graph works out what its shapes tell already, in place; return the graph.

    The shape of a Reshape that only repeats the batch of its input becomes a constant too.
    """
    sizes = Sizes(graph)
    constants = {tensor.name for tensor in graph.graph.initializer}
    made: dict[str, Array] = {}
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if not name or name in constants or name in made or name not in sizes.makers:
                continue
            value = sizes.value(name)
            if value is not None and is_known(value):
                made[name] = value.astype(np.int64) if value.dtype == object else value
            elif node.op_type == "Reshape" and index == 1 and (plain := _repeated(sizes, node, value)) is not None:
                node.input[1] = f"{node.output[0]}_edgekd_shape"
                made[node.input[1]] = plain
    for node in graph.graph.node:
        if any(name in made for name in node.output):
            node.output[:] = [f"{name}_edgekd_idle" if name in made else name for name in node.output]
    add_tensors(graph, made)
    return drop_unused(graph)


def _repeated(sizes: Sizes, node: Any, value: Array | None) -> Array | None:
    """The shape of a Reshape with zeros for sizes taken over, if all but one of its numbers can be told."""
    given = sizes.shapes.get(node.input[0], ())
    if value is None or attribute(node, "allowzero", 0):
        return None
    told = [-1 if isinstance(item, str) else int(item) for item in value]
    for axis, (item, size) in enumerate(zip(value, given, strict=False)):
        if isinstance(item, str) and item == size:
            told[axis] = 0
    return np.array(told, np.int64) if told.count(-1) <= 1 else None


def _shape(value: Any) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}:{axis}"
        for axis, dim in enumerate(dims)
    )


def _constant(node: Any) -> Array | None:
    from onnx import numpy_helper

    tensor = attribute(node, "value", None)
    value = None if tensor is None else numpy_helper.to_array(tensor)
    return value if value is not None and value.size <= LARGEST else None


def _cast(node: Any, values: list[Array]) -> Array:
    from onnx import helper

    return values[0].astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to", 1)))


def _slice(node: Any, values: list[Array]) -> Array:
    starts, ends = values[1], values[2]
    steps = values[4] if len(values) > 4 else np.array([1])
    return values[0][int(starts[0]) : int(ends[0]) : int(steps[0])]


def _gather(node: Any, values: list[Array]) -> Array:
    taken = values[0][values[1].astype(np.int64)]
    return taken if isinstance(taken, np.ndarray) else np.array(taken, values[0].dtype)


RULES: Mapping[str, Callable[[Any, list[Array]], Array]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda _, values: np.concatenate([np.atleast_1d(value) for value in values]),
    "Unsqueeze": lambda _, values: np.atleast_1d(values[0]),
    "Squeeze": lambda _, values: values[0].reshape(()),
    "Reshape": lambda _, values: values[0].reshape([int(size) for size in values[1]]),
    "Cast": _cast,
    "Sqrt": lambda _, values: np.sqrt(values[0]),
    "Div": lambda _, values: values[0] / values[1] if values[0].dtype.kind == "f" else values[0] // values[1],
    "Mul": lambda _, values: values[0] * values[1],
    "Add": lambda _, values: values[0] + values[1],
    "Sub": lambda _, values: values[0] - values[1],
}
