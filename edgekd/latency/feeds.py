"""Inputs for a model nobody described: shapes from the graph, its configuration and the user, values that fit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import ModelError, unknown

Array = npt.NDArray[Any]

# Names exporters give to dimensions, and what is meant.
BATCH_NAMES = ("batch_size", "batch", "n", "num_samples")
SEQUENCE_NAMES = ("sequence_length", "sequence", "seq_length", "seq_len", "seq", "encoder_sequence_length")
CHANNEL_NAMES = ("num_channels", "channels")
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
DTYPES = {
    "FLOAT": np.float32,
    "DOUBLE": np.float64,
    "FLOAT16": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT16": np.int16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
DEFAULT_SEQUENCE = 64
DEFAULT_VOCABULARY = 1000


@dataclass(frozen=True)
class Input:
    """One input of a graph: `shape` holds numbers, names of free dimensions, or None; `rows` the lookup table's."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    rows: int | None = None


@dataclass(frozen=True)
class Feeds:
    """Arrays by input name, and the batch and sequence length they have (None: the model has no such dimension)."""

    arrays: Mapping[str, Array]
    batch: int
    sequence: int | None


def synthesize(
    path: Path,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Feeds:
    """Make inputs for the ONNX file at `path`.

    Free dimensions become `batch` (1 unless given), `sequence` (64), or the image size of a `config.json` or
    `preprocessor_config.json` beside the file or one folder up; `shapes` fixes whole inputs by name. Token ids are
    random within the vocabulary, masks are ones, floats are standard normal.

    Raises:
        ModelError: not an ONNX file, a dimension that cannot be known, a fixed one that is not what was asked.
    """
    inputs = graph_inputs(path)
    given = dict(shapes or {})
    for name in given:
        if name not in {item.name for item in inputs}:
            raise ModelError(f"--shape: {unknown('input', name, [item.name for item in inputs])}")
    sizes = {**_image_sizes(path), "batch": batch or 1, "sequence": sequence or DEFAULT_SEQUENCE}
    resolved = {item.name: _shape(item, given.get(item.name), sizes, path) for item in inputs}
    found = {kind: _size_of(kind, inputs, resolved) for kind in ("batch", "sequence")}
    for kind, asked in (("batch", batch), ("sequence", sequence)):
        if asked is not None and found[kind] not in (None, asked):
            raise ModelError(f"{path} has a fixed {kind} of {found[kind]}, not {asked}: ask for {found[kind]}")
    arrays = {item.name: _values(item, resolved[item.name], seed) for item in inputs}
    return Feeds(arrays, found["batch"] or 1, found["sequence"])


def graph_inputs(path: Path) -> list[Input]:
    """The inputs of an ONNX graph that have to be fed.

    Raises:
        ModelError: there is no such file, or it is not ONNX.
    """
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}") from None
    except Exception as error:
        raise ModelError(f"{path} is not an ONNX model: {error}") from error
    if not graph.node:
        raise ModelError(f"{path} is not an ONNX model: it holds no graph")
    initial = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    scalars = {tensor.name for tensor in graph.initializer}
    rows = _lookup_rows(graph, initial)
    return [_input_of(value, rows) for value in graph.input if value.name not in scalars]


def _input_of(value: Any, rows: Mapping[str, int]) -> Input:
    import onnx

    kind = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type)
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None
        for dim in kind.shape.dim
    )
    return Input(value.name, dtype, shape, rows.get(value.name))


def _lookup_rows(graph: Any, initial: Mapping[str, int]) -> dict[str, int]:
    """Rows of the table each input looks up, where a Gather or a fused embedding node reads it directly."""
    origin: dict[str, str] = {}
    rows: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in ("Cast", "DequantizeLinear", "Identity") and node.input:
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
        pairs = []
        if node.op_type == "Gather":
            pairs = [(node.input[1], node.input[0])]
        elif node.op_type in ("EmbedLayerNormalization", "QEmbedLayerNormalization"):
            pairs = [(node.input[0], node.input[2])]
        for ids, table in pairs:
            source, held = origin.get(ids, ids), origin.get(table, table)
            if held in initial:
                rows[source] = min(rows.get(source, initial[held]), initial[held])
    return rows


def _shape(item: Input, given: Sequence[int] | None, sizes: Mapping[str, int], path: Path) -> tuple[int, ...]:
    if given is not None:
        fits = len(given) == len(item.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(item.shape, given, strict=True)
        )
        if not fits:
            raise ModelError(f"--shape {item.name}: the model takes {_show(item.shape)}, got {_show(tuple(given))}")
        return tuple(given)
    kinds = [_kind(item, axis) for axis in range(len(item.shape))]
    unclear = [axis for axis, kind in enumerate(kinds) if not isinstance(kind, int) and kind not in sizes]
    if unclear:
        names = ", ".join(str(item.shape[axis] or f"axis {axis}") for axis in unclear)
        example = ",".join(str(sizes.get(str(kind), 224 if axis > 1 else 3)) for axis, kind in enumerate(kinds))
        raise ModelError(
            f"{path}: input {item.name} {_show(item.shape)} leaves {names} open and no configuration beside the file "
            f"tells; give it with --shape {item.name}={example}"
        )
    return tuple(kind if isinstance(kind, int) else sizes[kind] for kind in kinds)


def _kind(item: Input, axis: int) -> int | str:
    """A fixed size, or what a free dimension stands for: batch, sequence, channels, height, width, or its own name."""
    dim = item.shape[axis]
    if isinstance(dim, int):
        return dim
    name = (dim or "").lower()
    if name in SEQUENCE_NAMES:
        return "sequence"
    if name in BATCH_NAMES:
        return "batch"
    if name in CHANNEL_NAMES:
        return "channels"
    if len(item.shape) == 4 and axis > 0:
        return ("batch", "channels", "height", "width")[axis]
    if axis == 0:
        return "batch"
    return "sequence" if axis == 1 and item.name in TOKEN_INPUTS else name or f"axis {axis}"


def _size_of(kind: str, inputs: Sequence[Input], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The batch or sequence length the resolved inputs have."""
    for item in inputs:
        for axis, size in enumerate(shapes[item.name]):
            fixed = "batch" if axis == 0 else "sequence" if axis == 1 and item.name in TOKEN_INPUTS else ""
            free = _kind(item, axis)
            if kind in (fixed, free):
                return size
    return None


def _image_sizes(path: Path) -> dict[str, int]:
    """Channels, height and width from the configuration files beside the model or one folder up."""
    sizes: dict[str, int] = {}
    for folder in (path.parent, path.parent.parent):
        config = read_json(folder / "config.json")
        processor = read_json(folder / "preprocessor_config.json")
        crop = processor.get("crop_size") if processor.get("do_center_crop") else None
        size = crop or processor.get("size") or config.get("image_size")
        height, width = _sides(size)
        if height and width:
            sizes = {"height": height, "width": width, **sizes}
        if isinstance(config.get("num_channels"), int):
            sizes = {"channels": config["num_channels"], **sizes}
    return {"channels": 3, **sizes} if "height" in sizes else sizes


def _sides(size: Any) -> tuple[int | None, int | None]:
    """Height and width from 224, [224, 224], {height, width} or {shortest_edge}."""
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = [size.get("height", edge), size.get("width", edge)]
    pair = size if isinstance(size, list) and len(size) == 2 else [size, size]
    return (pair[0], pair[1]) if all(isinstance(side, int) for side in pair) else (None, None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _values(item: Input, shape: tuple[int, ...], seed: int) -> Array:
    if item.dtype not in DTYPES:
        raise ModelError(f"input {item.name} holds {item.dtype.lower()}, which edgekd cannot make up: give --feeds")
    dtype = np.dtype(DTYPES[item.dtype])
    # Inputs of the same name get the same values in every model, so that teacher and student see the same work.
    rng = np.random.default_rng([seed, zlib.crc32(item.name.encode())])
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if item.name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if "mask" in item.name or dtype.kind == "b":
        return np.ones(shape, dtype)
    if item.name == "token_type_ids":
        return np.zeros(shape, dtype)
    high = item.rows or DEFAULT_VOCABULARY
    most = min(high, 2 ** (8 * dtype.itemsize - 1))
    return rng.integers(min(1, most - 1), most, size=shape).astype(dtype)


def _show(shape: Sequence[int | str | None]) -> str:
    return "×".join("?" if dim is None else str(dim) for dim in shape)
