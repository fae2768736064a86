"""Attention masks that survive 8 bits: 0 and the lowest float, added to scores, would leave scores a single step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.export.rewrite import attribute
from edgekd.export.sizes import Sizes
from edgekd.export.static import drop_unused

Range = tuple[float, float]

BARRED = -1e4
"""Anything at or below this is a mask's "never", not a score."""
MARGIN = 8.0
"""How far below the lowest score a barred one lies: e^-8 is a tenth of a step of an 8-bit softmax."""


def plain_masks(graph: Any, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Rewrite additive masks as `(mask - 1) * K` with the smallest K that still bars, and return the ranges changed.

    A mask is a float tensor that is computed from integer inputs and single numbers alone. Whether it equals
    `0 where attention_mask else lowest`, for any keys of any query, is tried on random masks; others are left as they
    are. Where and Cast to bool go away with it, which compilers for NPUs do not like.

    Args:
        graph: ModelProto, changed in place; nodes no longer used stay in it.
        ranges: minimum and maximum of tensors without padding; the scores that a mask is added to must be among them.
    """
    found = list(_masked_scores(graph))
    masks = sorted({mask for _, mask, _ in found})
    replaced = {mask: source for mask in masks if (source := _source_of(graph, mask))}
    added = [(node, mask, scores) for node, mask, scores in found if mask in replaced and scores in ranges]
    if not added:
        return {}
    spread = max(ranges[scores][1] - ranges[scores][0] for _, _, scores in added)
    changed: dict[str, Range] = {}
    for node, mask, scores in added:
        node.input[list(node.input).index(mask)] = _names(replaced[mask])["mask"]
        low, high = ranges[scores]
        changed[node.output[0]] = (low - MARGIN, high)
    for source in sorted({replaced[mask] for _, mask, _ in added}):
        changed |= _insert(graph, source, spread + MARGIN)
    return changed


def shorten_masks(graph: Any) -> int:
    """Write additive masks as `(mask - 1) * K`, in place, with the K they have; return how many.

    Exporters work such a mask out in twenty operators. The values stay the same, `[B, 1, 1, S]` instead of a row for
    every query, which `Attention` nodes then need to be given again; layers that choose tokens read its first row.
    Masks that are anything else are left alone.
    """
    pure, sizes = _pure(graph), Sizes(graph)
    readers = [(node, index) for node in graph.graph.node for index in _mask_read(node, pure)]
    readers += [(wide, 0) for node in graph.graph.node if (wide := _first_row(node, sizes)) is not None]
    bars: dict[str, float] = {}
    count = 0
    for mask in sorted({node.input[index] for node, index in readers}):
        told = _told(graph, mask)
        if told is None or bars.setdefault(told[0], told[1]) != told[1]:
            continue
        count += 1
        for node, index in readers:
            if node.input[index] == mask:
                node.input[index] = _names(told[0])["mask"]
    for source, bar in bars.items():
        _insert(graph, source, bar)
    if count:
        drop_unused(graph)
    return count


def _mask_read(node: Any, pure: set[str]) -> list[int]:
    """Which input of a node is a mask that may have one row instead of many."""
    if node.op_type == "Attention" and len(node.input) > 3 and node.input[3] in pure:
        return [3]
    if node.op_type == "Add" and len(set(node.input) & pure) == 1:
        return [index for index, name in enumerate(node.input) if name in pure]
    return []


def _first_row(node: Any, sizes: Sizes) -> Any:
    """The node that `[:, 0, 0]` of a tensor begins with, whose other rows nobody reads; None if this is not its end."""
    begin = sizes.makers.get(node.input[0]) if node.input else None
    pair = [each for each in (begin, node) if each is not None and each.op_type == "Gather"]
    if len(pair) < 2 or any(attribute(each, "axis", 0) != 1 or sizes.scalar(each.input[1]) != 0 for each in pair):
        return None
    return begin


def barred(ranges: Mapping[str, Range]) -> list[str]:
    """Tensors whose range holds a mask's "never" and so cannot be quantized."""
    return [name for name, (low, _) in ranges.items() if low <= BARRED]


def _masked_scores(graph: Any) -> Iterator[tuple[Any, str, str]]:
    """Every Add of a mask and scores: the node, the mask and the scores."""
    pure = _pure(graph)
    for node in graph.graph.node:
        if node.op_type == "Add" and len(set(node.input) & pure) == 1:
            mask = next(name for name in node.input if name in pure)
            scores = next(name for name in node.input if name not in pure)
            yield node, mask, scores


def _pure(graph: Any) -> set[str]:
    """Outputs that are computed from integer inputs and single numbers alone, at least one of them an input."""
    from onnx import TensorProto

    initial = {tensor.name: tensor for tensor in graph.graph.initializer}
    integers = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
    constant = {name for name, t in initial.items() if t.data_type in integers or int(np.prod(t.dims)) == 1}
    given = {v.name for v in graph.graph.input if v.type.tensor_type.elem_type in integers} - set(initial)
    computed: set[str] = set()
    for node in graph.graph.node:
        names = {name for name in node.input if name}
        if names <= constant:
            constant |= set(node.output)
        elif names <= constant | given | computed:
            computed |= set(node.output)
    return computed


def _source_of(graph: Any, mask: str) -> str:
    """The integer input that a tensor is a plain mask of, or an empty string."""
    told = _told(graph, mask)
    return "" if told is None else told[0]


def _told(graph: Any, mask: str) -> tuple[str, float] | None:
    """The integer input that a tensor is a plain mask of, and how far below 0 a barred score is put."""
    nodes = _ancestors(graph, mask)
    wanted = {name for node in nodes for name in node.input}
    inputs = [value for value in graph.graph.input if value.name in wanted]
    candidates = [value.name for value in inputs if "mask" in value.name]
    if len(candidates) != 1:
        return None
    rng, bars = np.random.default_rng(0), set()
    for _ in range(3):
        feeds = {value.name: _random(value, rng) for value in inputs}
        values = _evaluate(graph, nodes, inputs, mask, feeds)
        if values is None or not _is_plain(values, feeds[candidates[0]]):
            return None
        bars.add(-float(values.min()))
    return (str(candidates[0]), bars.pop()) if len(bars) == 1 else None


def _is_plain(values: npt.NDArray[Any], mask: npt.NDArray[Any]) -> bool:
    if values.ndim != 4 or values.dtype.kind != "f" or values.min() > BARRED:
        return False
    expected = np.where(mask[:, None, None, :] > 0, 0.0, values.min())
    if any(size not in (1, whole) for size, whole in zip(expected.shape, values.shape, strict=True)):
        return False
    return bool(np.array_equal(np.broadcast_to(expected, values.shape), values))


def _random(value: Any, rng: np.random.Generator) -> npt.NDArray[Any]:
    shape = [dim.dim_value or (2, 7)[min(axis, 1)] for axis, dim in enumerate(value.type.tensor_type.shape.dim)]
    data = rng.integers(0, 2, shape)
    data[0, 0] = 0  # at least one barred and one open
    data[0, -1] = 1
    kinds = {6: np.int32, 7: np.int64, 9: np.bool_}
    return data.astype(kinds.get(value.type.tensor_type.elem_type, np.int64))


def _evaluate(
    graph: Any, nodes: list[Any], inputs: list[Any], name: str, feeds: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[Any] | None:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    wanted = {item for node in nodes for item in node.input}
    part = helper.make_graph(
        nodes, "mask", inputs, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        [tensor for tensor in graph.graph.initializer if tensor.name in wanted],
    )  # fmt: skip
    model = helper.make_model(part, opset_imports=graph.opset_import, ir_version=graph.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        result: npt.NDArray[Any] = session.run(None, dict(feeds))[0]
    except Exception:  # noqa: BLE001 - not a float tensor, or it does not run alone: then it is no plain mask
        return None
    return result


def _ancestors(graph: Any, name: str) -> list[Any]:
    """The nodes that compute a tensor, in order."""
    needed, kept = {name}, []
    for node in reversed(graph.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    return kept[::-1]


def _names(source: str) -> dict[str, str]:
    return {key: f"edgekd/{source}/{key}" for key in ("axes", "one", "bar", "wide", "float", "open", "mask")}


def _insert(graph: Any, source: str, bar: float) -> dict[str, Range]:
    """Put `(source - 1) * bar`, shaped [B, 1, 1, S], before all other nodes; return the ranges of its parts."""
    from onnx import TensorProto, helper, numpy_helper

    names = _names(source)
    graph.graph.initializer.extend([
        numpy_helper.from_array(np.array([1, 2], np.int64), names["axes"]),
        numpy_helper.from_array(np.array(1.0, np.float32), names["one"]),
        numpy_helper.from_array(np.array(bar, np.float32), names["bar"]),
    ])  # fmt: skip
    nodes = [
        helper.make_node("Unsqueeze", [source, names["axes"]], [names["wide"]], names["wide"]),
        helper.make_node("Cast", [names["wide"]], [names["float"]], names["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [names["float"], names["one"]], [names["open"]], names["open"]),
        helper.make_node("Mul", [names["open"], names["bar"]], [names["mask"]], names["mask"]),
    ]
    rest = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *rest])
    return {names["float"]: (0.0, 1.0), names["open"]: (-1.0, 0.0), names["mask"]: (-bar, 0.0)}
