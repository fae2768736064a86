"""Data sets that come with an installed package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from edgekd.data.images import array_digests
from edgekd.data.table import Table
from edgekd.errors import DataError, unknown

_DIGITS_SPLITS = {"train": (0, 1297), "validation": (1297, 1497), "test": (1497, 1797)}


def find_builtin(name: str) -> dict[str, Callable[[], Table]]:
    """Split name to its reader, for a name such as `sklearn:digits`.

    Raises:
        DataError: there is no such data set.
    """
    if name not in BUILTINS:
        raise DataError(unknown("built-in data set", name, BUILTINS))
    return BUILTINS[name]()


def _digits() -> dict[str, Callable[[], Table]]:
    return {split: partial(_read_digits, split) for split in _DIGITS_SPLITS}


def _read_digits(split: str) -> Table:
    """Handwritten digits, 8x8 grey: the order is that of their SHA-256, so the splits never change."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.array(sorted(range(len(pixels)), key=array_digests(pixels).__getitem__))
    chosen = order[slice(*_DIGITS_SPLITS[split])]
    return Table(f"sklearn:digits ({split})", {"image": pixels[chosen], "label": digits.target[chosen].tolist()})


BUILTINS: dict[str, Callable[[], dict[str, Callable[[], Table]]]] = {"sklearn:digits": _digits}
