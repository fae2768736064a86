"""Inputs for a model nobody described: shapes from the graph, its configuration and the user, values that fit."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from edgekd.errors import ModelError, unknown
from edgekd.latency.inputs import Input, graph_inputs

__all__ = ["Feeds", "Input", "check_feeds", "graph_inputs", "read_feeds", "read_json", "resized", "synthesize"]

Array = npt.NDArray[Any]

# Names exporters give to dimensions, and what is meant.
BATCH_NAMES = ("batch_size", "batch", "n", "num_samples")
SEQUENCE_NAMES = ("sequence_length", "sequence", "seq_length", "seq_len", "seq", "encoder_sequence_length")
CHANNEL_NAMES = ("num_channels", "channels")
# Names that converters give to dimensions they know nothing of; `?` and None are shown alike.
NAMELESS = re.compile(r"\?|none|-1|unk__\d+|p2o\.dynamicdimension\.\d+|dynamicdimension\.\d+", re.IGNORECASE)
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
DTYPES = {
    "FLOAT": np.float32,
    "DOUBLE": np.float64,
    "FLOAT16": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT16": np.int16,
    "INT8": np.int8,
    "UINT64": np.uint64,
    "UINT32": np.uint32,
    "UINT16": np.uint16,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
DEFAULT_SEQUENCE = 64
DEFAULT_VOCABULARY = 1000


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
    values: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Feeds:
    """Make inputs for the ONNX file at `path`.

    Free dimensions become `batch` (1 unless given), `sequence` (64), or the image size of a `config.json` or
    `preprocessor_config.json` beside the file or one folder up; `shapes` fixes whole inputs by name and `values` fills
    inputs with one number. Otherwise token ids are random within the vocabulary, masks and whole numbers without a
    shape are ones, floats are standard normal.

    Raises:
        ModelError: not an ONNX file, a dimension that cannot be known, a fixed one that is not what was asked.
    """
    inputs = graph_inputs(path)
    given, filled = dict(shapes or {}), dict(values or {})
    for option, names in (("--shape", given), ("--value", filled)):
        for name in names:
            if name not in {item.name for item in inputs}:
                raise ModelError(f"{option}: {unknown('input', name, [item.name for item in inputs])}")
    sizes = {**_image_sizes(path), "batch": batch or 1, "sequence": sequence or DEFAULT_SEQUENCE}
    _require_sizes([item for item in inputs if item.name not in given], sizes, path)
    resolved = {item.name: _shape(item, given.get(item.name), sizes) for item in inputs}
    found = {kind: _size_of(kind, inputs, resolved) for kind in ("batch", "sequence")}
    for kind, asked in (("batch", batch), ("sequence", sequence)):
        if asked is not None and found[kind] not in (None, asked):
            raise ModelError(f"{path} has a fixed {kind} of {found[kind]}, not {asked}: ask for {found[kind]}")
    try:
        arrays = {item.name: _values(item, resolved[item.name], filled.get(item.name), seed) for item in inputs}
    except (MemoryError, OverflowError, ValueError):
        shown = ", ".join(f"{name} {_show(shape)}" for name, shape in resolved.items())
        raise ModelError(
            f"{path}: inputs of this size do not fit into memory: {shown}; ask for a smaller one"
        ) from None
    return Feeds(arrays, found["batch"] or 1, found["sequence"])


def resized(
    path: Path, shapes: Mapping[str, Sequence[int]], *, batch: int | None, sequence: int | None
) -> dict[str, tuple[int, ...]]:
    """The given `shapes` with another batch or sequence length where the graph at `path` leaves those free.

    Raises:
        ModelError: as `graph_inputs`.
    """
    items = {item.name: item for item in graph_inputs(path)}
    asked = {kind: size for kind, size in (("batch", batch), ("sequence", sequence)) if size is not None}
    changed = {}
    for name, shape in shapes.items():
        item = items.get(name)
        if item is None or len(item.shape) != len(shape):
            changed[name] = tuple(shape)
        else:
            changed[name] = tuple(asked.get(str(_kind(item, axis)), size) for axis, size in enumerate(shape))
    return changed


def read_feeds(file: Path) -> Feeds:
    """The inputs in an .npz file.

    Raises:
        ModelError: it cannot be read, or holds something other than plain arrays.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except OSError as error:
        _refuse_feeds(file, error.strerror or "it is no .npz file")
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        # numpy's own words are not passed on: they advise to unpickle what nobody knows the origin of.
        _refuse_feeds(file, "it is no .npz file, is damaged, or holds Python objects instead of numbers")
    ids = arrays.get("input_ids")
    first = next(iter(arrays.values()), np.zeros(1))
    length = int(ids.shape[1]) if ids is not None and ids.ndim > 1 else None
    return Feeds(arrays, int(first.shape[0]) if first.ndim else 1, length)


def _refuse_feeds(file: Path, reason: str) -> NoReturn:
    raise ModelError(
        f"cannot read the inputs {file}: {reason}; write one array of numbers for each input, for instance with "
        f"numpy.savez({file.name!r}, input_ids=…)"
    )


def check_feeds(path: Path, feeds: Feeds, file: Path) -> None:
    """See that what was read from `file` is what the graph at `path` takes: names, types and shapes.

    Raises:
        ModelError: it is not; names everything that is wrong.
    """
    inputs = {item.name: item for item in graph_inputs(path)}
    wrong = [unknown("input", name, inputs) for name in feeds.arrays if name not in inputs]
    wrong += [f"input {name} is missing" for name in inputs if name not in feeds.arrays]
    for name, array in feeds.arrays.items():
        item = inputs.get(name)
        if item is None:
            continue
        wanted = DTYPES.get(item.dtype)
        if wanted is not None and array.dtype != wanted:
            wrong.append(f"input {name} takes {np.dtype(wanted)}, got {array.dtype}")
        # A graph may leave the rank open, which looks as if it took a single number.
        if item.shape and not _fits(item, array.shape):
            wrong.append(f"input {name} takes {_show(item.shape)}, got {_show(array.shape)}")
    if wrong:
        raise ModelError(f"the inputs {file} do not fit {path}: {'; '.join(wrong)}")


def _fits(item: Input, given: Sequence[int]) -> bool:
    return len(given) == len(item.shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(item.shape, given, strict=True)
    )


def _require_sizes(inputs: Sequence[Input], sizes: Mapping[str, int], path: Path) -> None:
    """Raise one error that names every free dimension nobody knows and the options that would fix them."""
    opens, options = [], []
    for item in inputs:
        kinds = [_kind(item, axis) for axis in range(len(item.shape))]
        unclear = [axis for axis, kind in enumerate(kinds) if not isinstance(kind, int) and kind not in sizes]
        if unclear:
            names = ", ".join(_name_of(item.shape[axis]) or f"axis {axis}" for axis in unclear)
            opens.append(f"input {item.name} {_show(item.shape)} leaves {names} open")
            options.append(f"--shape {item.name}={','.join(str(size) for size in _example(item, kinds, sizes))}")
    if opens:
        raise ModelError(
            f"{path}: {'; '.join(opens)}, and no configuration beside the file tells; "
            f"give {'it' if len(opens) == 1 else 'them'}, for instance with {' '.join(options)}"
        )


def _example(item: Input, kinds: Sequence[int | str], sizes: Mapping[str, int]) -> list[int]:
    """Sizes the input might have: an image's in four dimensions, else a batch of sequences."""
    image, text = (sizes["batch"], 3, 224, 224), (sizes["batch"], *[sizes["sequence"]] * (len(kinds) - 1))
    usual = image if len(kinds) == 4 else text
    # A fixed number in front is no batch (the layers of a recurrent state, say): the batch comes second there.
    inner = sizes["batch"] if kinds and isinstance(kinds[0], int) and len(kinds) == 3 else None
    return [
        kind if isinstance(kind, int) else sizes.get(kind, inner if inner and axis == 1 else usual[axis])
        for axis, kind in enumerate(kinds)
    ]


def _shape(item: Input, given: Sequence[int] | None, sizes: Mapping[str, int]) -> tuple[int, ...]:
    if given is not None:
        if not _fits(item, given):
            raise ModelError(f"--shape {item.name}: the model takes {_show(item.shape)}, got {_show(tuple(given))}")
        return tuple(given)
    kinds = [_kind(item, axis) for axis in range(len(item.shape))]
    return tuple(kind if isinstance(kind, int) else sizes[kind] for kind in kinds)


def _kind(item: Input, axis: int) -> int | str:
    """A fixed size, or what a free dimension stands for: batch, sequence, channels, height, width, or its own name."""
    dim = item.shape[axis]
    if isinstance(dim, int):
        return dim
    name = _name_of(dim).lower()
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
    """The batch or sequence length the resolved inputs have: a free dimension of that name, else the usual axis."""
    for item in inputs:
        for axis, size in enumerate(shapes[item.name]):
            if _kind(item, axis) == kind:
                return size
    for item in inputs:
        for axis, size in enumerate(shapes[item.name]):
            usual = "batch" if axis == 0 else "sequence" if axis == 1 and item.name in TOKEN_INPUTS else ""
            if usual == kind and isinstance(item.shape[axis], int):
                return size
    return None


def _name_of(dim: int | str | None) -> str:
    """The name of a free dimension, if it says anything."""
    return "" if dim is None or NAMELESS.fullmatch(str(dim)) else str(dim)


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


def _values(item: Input, shape: tuple[int, ...], filled: float | None, seed: int) -> Array:
    if item.dtype not in DTYPES:
        raise ModelError(f"input {item.name} holds {item.dtype.lower()}, which edgekd cannot make up: give --feeds")
    dtype = np.dtype(DTYPES[item.dtype])
    if filled is not None:
        _require_value(item, dtype, filled)
        return np.full(shape, filled).astype(dtype)
    # Inputs of the same name get the same values in every model, so that teacher and student see the same work.
    rng = np.random.default_rng([seed, zlib.crc32(item.name.encode())])
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if item.name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if "mask" in item.name or dtype.kind == "b" or not shape:
        return np.ones(shape, dtype)
    if item.name == "token_type_ids":
        return np.zeros(shape, dtype)
    high = item.rows or DEFAULT_VOCABULARY
    most = min(high, 2 ** (8 * dtype.itemsize - 1))
    return rng.integers(min(1, most - 1), most, size=shape).astype(dtype)


def _require_value(item: Input, dtype: np.dtype[Any], value: float) -> None:
    """Refuse a number that would become another one in an input of whole numbers."""
    if dtype.kind == "f":
        return
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if not (float(value).is_integer() and low <= value <= high):
        raise ModelError(f"--value {item.name}: it takes whole numbers from {low} to {high}, got {value:g}")


def _show(shape: Sequence[int | str | None]) -> str:
    return "×".join(str(dim) if isinstance(dim, int) else _name_of(dim) or "?" for dim in shape) or "(a number)"
