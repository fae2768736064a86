"""From the columns of a table to checked inputs: text that is there, images that open."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekd.data.examples import Examples, Kind, Labels
from edgekd.data.images import Images, array_digests, inspect, to_ref
from edgekd.data.table import Table
from edgekd.errors import DataError


def read_inputs(table: Table, mapping: Mapping[str, str], kind: Kind, labels: Labels | None = None) -> Examples:
    """The examples of a table, every input checked.

    Raises:
        DataError: a text is empty or no text, or an image cannot be decoded; with the rows affected.
    """
    if kind == "image":
        return _read_images(table, mapping["image"], labels)
    roles = [role for role in ("text", "text_pair") if role in mapping]
    columns = {role: _read_text(table, mapping[role]) for role in roles}
    digests = [_text_digest(texts) for texts in zip(*columns.values(), strict=True)]
    return Examples(columns, labels, digests)


def _read_text(table: Table, column: str) -> list[str]:
    values = table.values(column)
    wrong = [row for row, value in enumerate(values) if value is not None and not isinstance(value, str)]
    if wrong:
        got = type(values[wrong[0]]).__name__
        raise DataError(
            f"{table.name}: column {column!r} holds {got}, not text, in {table.affected(wrong)}; name another"
        )
    empty = [row for row, value in enumerate(values) if value is None or not value.strip()]
    if empty:
        raise DataError(
            f"{table.name}: empty text in column {column!r}, {table.affected(empty)}; fill in or remove them"
        )
    halves = [row for row, value in enumerate(values) if not _is_unicode(value)]
    if halves:
        raise DataError(
            f"{table.name}: broken characters (half of a surrogate pair) in column {column!r}, "
            f"{table.affected(halves)}; write the text anew as utf-8"
        )
    return list(values)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_digest(texts: tuple[str, ...]) -> bytes:
    parts = [text.encode() for text in texts]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()


def _read_images(table: Table, column: str, labels: Labels | None) -> Examples:
    values: Any = table.values(column)
    if isinstance(values, np.ndarray):
        return Examples({"image": values}, labels, array_digests(values))
    refs = [to_ref(value, table.folder) for value in values]
    digests, broken = inspect(refs)
    if broken:
        rows = [row for row, _ in broken]
        raise DataError(
            f"{table.name}: broken image in {table.affected(rows)}; the first: {broken[0][1]}; replace or remove them"
        )
    return Examples({"image": Images([ref for ref in refs if ref is not None])}, labels, digests)
