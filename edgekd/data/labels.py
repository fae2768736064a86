"""From labels as they are written (numbers or names) to class numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.data.examples import UNLABELLED, Labels
from edgekd.data.table import Table
from edgekd.errors import DataError, nearest

Label = int | str

_WHOLE = re.compile(r"(-?\d+)(\.0+)?", re.ASCII)
"""A number as tables write it; whole numbers become `1.0` where a column has gaps."""


@dataclass(frozen=True)
class LabelRule:
    """`names` of the classes in order, and the class number of each label as it is `written` in the data."""

    names: tuple[str, ...]
    written: Mapping[Label, int]


def read_labels(table: Table, column: str, names: Sequence[str]) -> list[Label | None]:
    """The labels of a table, None where there is none.

    Class numbers of `datasets` become their names when the teacher (`names`) knows all of these, since the two may
    count the classes in another order.

    Raises:
        DataError: the labels are lists (several classes at once) or fractions (regression).
    """
    if column not in table.columns:
        return [None] * len(table)
    values = table.values(column)
    bad = [row for row, value in enumerate(values) if not _is_label(value)]
    if bad:
        value = values[bad[0]]
        what = "several labels at once (multi-label)" if isinstance(value, list | dict) else "no class (regression)"
        raise DataError(
            f"{table.name}: label {value!r} is {what}, which is not supported, in {table.affected(bad)}; "
            "give each row one class number or name"
        )
    known = {name.casefold() for name in names}
    plain = [_plain(value, known) for value in values]
    classes = table.classes.get(column, ())
    if classes and (not names or {name.casefold() for name in classes} <= known):
        plain = [classes[label] if isinstance(label, int) and label < len(classes) else label for label in plain]
    return plain


def refuse_signs(tables: Iterable[Table], column: str) -> None:
    """Refuse two classes that are written as -1 and 1: one of them would count as no label.

    Raises:
        DataError: they are, in all tables together.
    """
    known = [table for table in tables if column in table.columns and column not in table.classes]
    found = {_spelled(value) for table in known for value in table.values(column)} - {"", "None", "nan"}
    if found == {"1", str(UNLABELLED)}:
        raise DataError(
            f"{known[0].name}: column {column!r} holds {UNLABELLED} and 1 only, and {UNLABELLED} stands for no label: "
            "write 0 for the other class, or nothing for no label"
        )


def make_rule(
    labels: Mapping[str, Sequence[Label | None]], id2label: Mapping[int, str] | None, order: Sequence[str]
) -> LabelRule:
    """How the labels of all splits are to be understood.

    Args:
        labels: the labels of each split.
        id2label: the teacher's class names; None makes them from the data.
        order: class names in the order the data itself states, if it does.

    Raises:
        DataError: without a teacher, one split has numbers and another names.
    """
    found = {split: {label for label in written if label is not None} for split, written in labels.items()}
    distinct = {label for each in found.values() for label in each}
    if id2label is not None:
        return _matched(distinct, id2label)
    if not (order and distinct <= set(order)):
        _refuse_two_ways(found)
    return _derived(distinct, order)


def _refuse_two_ways(found: Mapping[str, set[Label]]) -> None:
    numbered = {split: [_number(label) is not None for label in labels] for split, labels in found.items() if labels}
    numbers = next((split for split, each in numbered.items() if all(each)), None)
    names = next((split for split, each in numbered.items() if not any(each)), None)
    if numbers is not None and names is not None:
        shown = [", ".join(sorted(map(str, found[split]))[:3]) for split in (names, numbers)]
        raise DataError(
            f"the {names} split names its classes ({shown[0]}), the {numbers} split numbers them ({shown[1]}), and "
            "nothing says which is which; write them in one way"
        )


def apply_rule(rule: LabelRule, labels: Sequence[Label | None], table: Table) -> Labels | None:
    """Class numbers [N], -1 where there is no label; None if none has one.

    Raises:
        DataError: a label is none of the classes.
    """
    unknown = [row for row, label in enumerate(labels) if label is not None and label not in rule.written]
    if unknown:
        label = str(labels[unknown[0]])
        numbered = [f"{number} {name!r}" for number, name in enumerate(rule.names)]
        shown = ", ".join(numbered[:20]) + (f", … ({len(numbered)} in all)" if len(numbered) > 20 else "")
        raise DataError(
            f"{table.name}: unknown label {label!r}{nearest(label, rule.names)} in {table.affected(unknown)}; "
            f"the model's classes are: {shown}"
        )
    if all(label is None for label in labels):
        return None
    return np.array([UNLABELLED if label is None else rule.written[label] for label in labels], dtype=np.int64)


def _is_label(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value) or value.is_integer()
    return value is None or isinstance(value, int | str)


def _plain(value: Any, known: Collection[str]) -> Label | None:
    """The label as it is written, None for none; `known` are names of classes, should one of them be `nan`."""
    if isinstance(value, str):
        value = value.strip()
        missing = _spelled(value) in ("", str(UNLABELLED)) or (value.casefold() == "nan" and "nan" not in known)
        return None if missing else value
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == UNLABELLED:
        return None
    return int(value)


def _number(label: Label) -> int | None:
    if isinstance(label, int):
        return label
    whole = _WHOLE.fullmatch(label)
    return int(whole[1]) if whole and not label.startswith("-") else None


def _spelled(value: Any) -> str:
    """A label as text, whole numbers without a fraction."""
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def _derived(distinct: set[Label], order: Sequence[str]) -> LabelRule:
    if order and distinct <= set(order):
        return LabelRule(tuple(order), {name: index for index, name in enumerate(order)})
    numbers = {label: _number(label) for label in distinct}
    if all(number is not None for number in numbers.values()):
        ordered: list[Any] = sorted({number for number in numbers.values() if number is not None})
    else:
        ordered = sorted({str(label) for label in distinct})
        numbers = {}
    index = {value: position for position, value in enumerate(ordered)}
    written = {label: index[numbers[label] if numbers else str(label)] for label in distinct}
    return LabelRule(tuple(str(value) for value in ordered), written)


def _matched(distinct: set[Label], id2label: Mapping[int, str]) -> LabelRule:
    names = {int(number): str(name) for number, name in id2label.items()}
    folded: dict[str, int] = {}
    for number, name in sorted(names.items()):
        folded.setdefault(name.casefold(), number)
    exact = {name: number for number, name in names.items()}
    by_name = {label: exact.get(str(label), folded.get(str(label).casefold())) for label in distinct}
    numbers = {label: _number(label) for label in distinct}
    by_number = {label: number if number in names else None for label, number in numbers.items()}
    # A number in JSON is an index first; text is a name first, even if the name is "1".
    ranked = [by_number, by_name] if any(isinstance(label, int) for label in distinct) else [by_name, by_number]
    complete = next((one for one in ranked if None not in one.values()), None)
    chosen = complete or {
        label: ranked[0][label] if ranked[0][label] is not None else ranked[1][label] for label in distinct
    }
    written = {label: number for label, number in chosen.items() if number is not None}
    return LabelRule(tuple(names[number] for number in sorted(names)), written)
