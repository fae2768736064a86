"""Which column plays which role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.data.examples import Kind
from edgekd.data.table import Table
from edgekd.errors import DataError, nearest, unknown

# In the order they are looked for; a pair is taken only with both of its columns.
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
TEXT = (
    *("text", "sentence", "content", "review", "document", "body", "comment", "message", "tweet", "utterance"),
    *("question", "query", "title", "headline", "input", "sentence1", "premise", "question1", "text1"),
)
IMAGE = ("image", "img", "picture", "photo", "image_path", "path", "file", "file_name", "filename", "filepath")
LABEL = (
    *("label", "labels", "class", "target", "category", "sentiment", "gold_label", "intent", "emotion", "topic"),
    *("label_name", "class_name", "y"),
)
ROLES: dict[Kind, tuple[str, ...]] = {"text": ("text", "text_pair", "label"), "image": ("image", "label")}


def map_columns(tables: Mapping[str, Table], given: Mapping[str, str], kind: Kind) -> dict[str, str]:
    """Role to column name, for all splits alike; `label` is left out if there is none.

    Raises:
        DataError: a role or column is unknown, no input column is found, or a split lacks it.
    """
    for role in given:
        if role not in ROLES[kind]:
            raise DataError(unknown(f"column role for {kind} data", role, ROLES[kind]))
    first = next(iter(tables.values()))
    mapping = dict(given)
    if not set(given) & {"text", "image"}:
        mapping |= _find_inputs(first, {*given.values()}, kind) | dict(given)
    if "label" not in given:
        mapping |= _find_label(tables, {*mapping.values()})
    for role, column in mapping.items():
        _check(tables, role, column)
    return mapping


def column_names(tables: Mapping[str, Table]) -> tuple[str, ...]:
    """All columns of all splits, in the order met."""
    return tuple(dict.fromkeys(column for table in tables.values() for column in table.columns))


def _find_inputs(table: Table, taken: set[str], kind: Kind) -> dict[str, str]:
    by_name = {column.lower(): column for column in table.columns if column not in taken}
    if kind == "text":
        for first, second in PAIRS:
            if first in by_name and second in by_name:
                return {"text": by_name[first], "text_pair": by_name[second]}
    for name in TEXT if kind == "text" else IMAGE:
        if name in by_name:
            return {kind: by_name[name]}
    candidates = [column for name, column in by_name.items() if name not in LABEL and _is_text(table, column)]
    if kind == "text" and len(candidates) == 1:
        return {kind: candidates[0]}
    raise DataError(
        f"{table.name}: no {kind} column found; its columns are {', '.join(table.columns)}; "
        f"name one, e.g. columns: {{{kind}: NAME}} (a CSV file needs its column names in the first line)"
    )


def _is_text(table: Table, column: str) -> bool:
    values: Sequence[Any] = table.values(column)
    return all(isinstance(value, str) for value in values[:100])


def _find_label(tables: Mapping[str, Table], taken: set[str]) -> dict[str, str]:
    by_name = {column.lower(): column for column in column_names(tables) if column not in taken}
    return next(({"label": by_name[name]} for name in LABEL if name in by_name), {})


def _check(tables: Mapping[str, Table], role: str, column: str) -> None:
    lacking = [table for table in tables.values() if column not in table.columns]
    # Labels are needed nowhere in particular: the teacher labels what has none.
    if not lacking or (role == "label" and len(lacking) < len(tables)):
        return
    columns = list(lacking[0].columns)
    raise DataError(
        f"{lacking[0].name} has no {role} column {column!r}{nearest(column, columns)}; "
        f"its columns are: {', '.join(columns)}"
    )
