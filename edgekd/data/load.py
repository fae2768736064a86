"""From a `DataSpec` to checked splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from edgekd.data.columns import column_names, map_columns
from edgekd.data.examples import DataSpec, Examples, Kind, Splits, join
from edgekd.data.files import read_file
from edgekd.data.folders import read_image_folder
from edgekd.data.inputs import read_inputs
from edgekd.data.labels import apply_rule, make_rule, read_labels, refuse_signs
from edgekd.data.source import find_source, nearest_path, readable
from edgekd.data.split import hold_out, limited, overlaps, without_repeats
from edgekd.data.table import Table
from edgekd.errors import DataError


def load_splits(spec: DataSpec, *, kind: Kind, id2label: Mapping[int, str] | None) -> Splits:
    """Read, check and split the data of a run.

    Args:
        spec: what to read.
        kind: what the examples are.
        id2label: the teacher's class names, to which labels are matched; None makes them from the labels.

    Raises:
        DataError: something cannot be read or does not fit, with what to do about it.
    """
    source = find_source(spec.path, spec.splits)
    if "train" not in source:
        raise DataError(f"{spec.path} has no train split, only {', '.join(source)}; name it in `splits`")
    tables = {role: reader() for role, reader in source.items()}
    splits, columns, names, notes = _read(tables, spec, kind, id2label)
    train = splits["train"]
    if "validation" not in splits:
        train, splits["validation"] = hold_out(train, spec.validation_fraction)
        notes.append(f"no validation split: {len(splits['validation']):,} of {len(tables['train']):,} rows held out")
    held = {role: split for role, split in splits.items() if role != "train"}
    notes += overlaps({"train": train, **held})
    if spec.unlabeled is not None:
        found = read_unlabelled(spec.unlabeled, columns, kind)
        added = without_repeats(found, {key for split in (train, *held.values()) for key in split.digests})
        notes.append(f"{len(added):,} unlabelled rows added ({len(found) - len(added):,} repeated ones left out)")
        train = join(train, added)
    if "test" in held and not _has_labels(held["test"]) and _has_labels(held["validation"]):
        del held["test"]
        notes.append("the test split has no labels and is left out: results are those on validation")
    train = limited(train, spec.limit, spec.seed)
    return Splits(
        train=train,
        validation=held["validation"],
        test=held.get("test"),
        fingerprint=_fingerprint([train, *held.values()], columns, names),
        label_names=names,
        columns=columns,
        available=column_names(tables),
        notes=tuple(notes),
    )


def load_evaluation(spec: DataSpec, *, kind: Kind, id2label: Mapping[int, str] | None) -> tuple[str, Examples, int]:
    """What a model is to be judged on: the test split, else validation, else all there is.

    A split whose labels are all withheld, as those of benchmarks are, is passed over.

    Returns:
        The split's name, its examples that have a label, and how many have none.

    Raises:
        DataError: as `load_splits`; or there are no labels.
    """
    source = find_source(spec.path, spec.splits)
    roles = [role for role in ("test", "validation", "train") if role in source]
    for role in roles:
        table = source[role]()
        splits, columns, _, _ = _read({role: table}, spec, kind, id2label)
        if _has_labels(splits[role]) or "label" not in columns or role == roles[-1]:
            break
    labelled = _labelled(splits[role], role, columns, tuple(table.columns))
    return role, labelled, len(splits[role]) - len(labelled)


def require_labels(splits: Splits, role: Literal["train", "validation", "test"]) -> Examples:
    """The examples of a split that have a label.

    Raises:
        DataError: none has.
    """
    examples = {"train": splits.train, "validation": splits.validation, "test": splits.test}[role]
    if examples is None:
        raise DataError(f"there is no {role} split; add one, or name it in `splits`")
    return _labelled(examples, role, splits.columns, splits.available)


def read_unlabelled(path: str, columns: Mapping[str, str], kind: Kind) -> Examples:
    """Inputs alone, from a file of rows, a text file with one text per line, or a folder of images.

    Raises:
        DataError: it cannot be read, or lacks an input the training data has.
    """
    local = Path(path).expanduser()
    if not local.exists():
        raise DataError(f"unlabelled data {path} does not exist{nearest_path(local)}; give a file")
    if local.is_dir():
        if kind == "text":
            raise DataError(f"unlabelled data {path} is a folder; give a file of rows or of one text per line")
        return read_inputs(read_image_folder(local), {"image": "image"}, kind)
    table = read_file(readable(local))
    inputs = {role: column for role, column in columns.items() if role != "label"}
    if not set(inputs.values()) <= set(table.columns):
        inputs = {role: column for role, column in map_columns({"train": table}, {}, kind).items() if role in inputs}
    if "text_pair" in columns and "text_pair" not in inputs:
        raise DataError(f"{path} has one text a row, but the training data has pairs; add a text_pair column")
    return read_inputs(table, inputs, kind)


def _read(
    tables: Mapping[str, Table], spec: DataSpec, kind: Kind, id2label: Mapping[int, str] | None
) -> tuple[dict[str, Examples], dict[str, str], tuple[str, ...], list[str]]:
    """The splits as they are on disk, the columns used, the class names and notes."""
    columns = map_columns(tables, spec.columns, kind)
    names = [] if id2label is None else list(id2label.values())
    column = columns.get("label")
    if column is not None:
        refuse_signs(tables.values(), column)
    written = {role: [] if column is None else read_labels(table, column, names) for role, table in tables.items()}
    order = next((table.classes[column] for table in tables.values() if column and column in table.classes), ())
    rule = make_rule(written, id2label, order)
    splits = {}
    for role, table in tables.items():
        labels = apply_rule(rule, written[role], table) if written[role] else None
        splits[role] = read_inputs(table, columns, kind, labels)
    notes = []
    if id2label is not None and not {name.casefold() for name in order} <= {name.casefold() for name in names}:
        notes.append(
            f"the data names its classes {', '.join(order[:5])}, the model {', '.join(names[:5])}: numbers used"
        )
    return splits, columns, rule.names, notes


def _has_labels(examples: Examples) -> bool:
    return examples.labels is not None and bool((examples.labels >= 0).any())


def _labelled(examples: Examples, role: str, columns: Mapping[str, str], available: tuple[str, ...]) -> Examples:
    if examples.labels is not None:
        return examples.take(np.flatnonzero(examples.labels >= 0))
    why = f"column {columns['label']!r} is empty there" if "label" in columns else "no label column was found"
    raise DataError(
        f"the {role} split has no labels: {why}; its columns are: {', '.join(available)}; "
        "name the one with the labels, e.g. columns: {label: NAME}"
    )


def _fingerprint(splits: Sequence[Examples], columns: Mapping[str, str], names: Sequence[str]) -> str:
    parts = [[split.fingerprint() for split in splits], dict(sorted(columns.items())), list(names)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
