"""Rows as they were read, with enough memory of where they stood to say it in an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import DataError


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of N rows.

    Attributes:
        name: what errors call it: a file name, mostly.
        columns: column name to its values: a list, a uint8 stack of images, or an Arrow array, converted when used.
        lines: the line of the file each row ends on, where the file has lines.
        classes: column name to the class names its numbers stand for, where the file says so.
        folder: what relative image paths are relative to.
    """

    name: str
    columns: Mapping[str, Any]
    lines: Sequence[int] = ()
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: Path = Path()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def values(self, column: str) -> Any:
        """The values of a column as a list, or as an array if they are a stack of images.

        Raises:
            DataError: a text is not UTF-8.
        """
        values = self.columns[column]
        try:
            return values.to_pylist() if hasattr(values, "to_pylist") else values
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.name}: column {column!r} holds text that is not UTF-8 ({error.reason}); write it anew as utf-8"
            ) from None

    def where(self, row: int) -> str:
        """`row 3 (line 4)`, counting from 1."""
        return f"row {row + 1}" + (f" (line {self.lines[row]})" if len(self.lines) else "")

    def affected(self, rows: Sequence[int]) -> str:
        """`row 3 (line 4), row 9 (line 10), …; 12 of 100 rows affected`."""
        shown = ", ".join(self.where(row) for row in rows[:3]) + (", …" if len(rows) > 3 else "")
        return f"{shown}; {len(rows):,} of {len(self):,} rows affected"


def from_records(name: str, records: Sequence[Mapping[str, Any]], lines: Sequence[int], folder: Path) -> Table:
    """A table of JSON objects; a key an object lacks is None there."""
    keys = dict.fromkeys(chain.from_iterable(records))
    columns = {key: [record.get(key) for record in records] for key in keys}
    return Table(name, columns, lines, {}, folder)


def concatenate(tables: Sequence[Table], name: str) -> Table:
    """One table of several shards.

    Raises:
        DataError: the shards do not have the same columns.
    """
    first = tables[0]
    if len(tables) == 1:
        return first
    for other in tables[1:]:
        if set(other.columns) != set(first.columns):
            raise DataError(
                f"{first.name} has the columns {', '.join(first.columns)} but {other.name} has "
                f"{', '.join(other.columns)}; all files of one split need the same columns"
            )
    columns = {key: _chain([table.values(key) for table in tables]) for key in first.columns}
    return Table(name, columns, (), first.classes, first.folder)


def _chain(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return list(chain.from_iterable(parts))
