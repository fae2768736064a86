"""MNIST-style IDX files (Yann LeCun's format: http://yann.lecun.com/exdb/mnist/)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekd.data.files import read_bytes
from edgekd.data.table import Table
from edgekd.errors import DataError

PREFIXES = {"train": "train", "test": "t10k"}
_UINT8 = 0x08


def find_idx(folder: Path) -> dict[str, Callable[[], Table]]:
    """Split name to its reader, for the IDX files of a folder; empty if it has none.

    Raises:
        DataError: labels are missing, or a file is there both packed and unpacked.
    """
    found: dict[str, Callable[[], Table]] = {}
    for split, prefix in PREFIXES.items():
        images, labels = _find(folder, f"{prefix}-images", 3), _find(folder, f"{prefix}-labels", 1)
        if images is None:
            continue
        if labels is None:
            raise DataError(f"{images} has no labels beside it; add {prefix}-labels-idx1-ubyte[.gz]")
        found[split] = partial(_read_pair, images, labels)
    return found


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of one IDX file.

    Raises:
        DataError: the file is not IDX of unsigned bytes, or is cut short.
    """
    content = read_bytes(path)
    rank = content[3] if len(content) >= 4 else 0
    if content[:3] != bytes((0, 0, _UINT8)) or not 1 <= rank <= 4 or len(content) < 4 + 4 * rank:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes (it starts with {content[:4].hex() or 'nothing'})"
        )
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path} announces {int(np.prod(shape)):,} bytes but holds {values.size:,}; fetch it again")
    return values.reshape(shape)


def _find(folder: Path, stem: str, rank: int) -> Path | None:
    names = [f"{stem}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    paths = [folder / name for name in names if (folder / name).is_file()]
    if len(paths) > 1:
        raise DataError(f"both {paths[0]} and {paths[1].name} are there; keep one of them")
    return paths[0] if paths else None


def _read_pair(images: Path, labels: Path) -> Table:
    try:
        pixels, classes = read_idx(images), read_idx(labels)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    if pixels.ndim not in (3, 4) or classes.ndim != 1 or len(pixels) != len(classes):
        raise DataError(
            f"{images.name} {list(pixels.shape)} and {labels.name} {list(classes.shape)} do not belong together; "
            "expected images [N, height, width] and labels [N]"
        )
    return Table(images.name, {"image": pixels, "label": classes.tolist()}, (), {}, images.parent)
