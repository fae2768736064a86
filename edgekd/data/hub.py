"""Data sets of the Hugging Face hub, or of its local cache, through `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edgekd.data.files import from_arrow
from edgekd.data.table import Table
from edgekd.errors import DataError


def find_hub(name: str, nearby: str) -> dict[str, Callable[[], Table]]:
    """Split name to its reader, for `NAME` or `NAME:CONFIGURATION`.

    Args:
        name: the data set.
        nearby: what to suggest if it cannot be had: a local path with a similar name.

    Raises:
        DataError: `datasets` is not installed, or cannot load it (no network, no such name).
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} is no local path{nearby}; to load it from the hub, install `datasets`") from None
    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name} is no local path{nearby}, and the hub data set cannot be loaded: {reason}; "
            "check the name and the network (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), or give a folder or file"
        ) from None
    return {split: partial(_read_split, f"{name} ({split})", rows) for split, rows in loaded.items()}


def _read_split(name: str, rows: Any) -> Table:
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    table = from_arrow(name, rows.with_format("arrow")[:], Path())
    found = {key: tuple(kind.names) for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(name, table.columns, (), found, Path())
