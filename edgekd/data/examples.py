"""The data types: what is asked for, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekd.data.images import Images

Kind = Literal["text", "image"]
Labels = npt.NDArray[np.int64]

UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where the data is and how to read it.

    Attributes:
        path: a folder, a file, `sklearn:digits` or the name of a hub dataset (`NAME` or `NAME:CONFIGURATION`).
        columns: role (`text`, `text_pair`, `image`, `label`) to column name; roles left out are detected.
        splits: role (`train`, `validation`, `test`) to a file in the folder or the name of a split.
        unlabeled: a file, or a folder of images, whose rows join the training split without a label.
        limit: keep this many training rows, drawn with `seed`.
        validation_fraction: share of the training rows held out where there is no validation split.
    """

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    unlabeled: str | None = None
    limit: int | None = None
    validation_fraction: float = 0.1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Examples:
    """N examples.

    Attributes:
        columns: `text` and maybe `text_pair` (strings), or `image` (items are PIL images or uint8 arrays [H, W] or
            [H, W, 3]).
        labels: class numbers [N], -1 where there is none; None if no example has one.
        digests: SHA-256 of each example's inputs, label left out; empty where unknown.
    """

    columns: Mapping[str, Sequence[Any] | npt.NDArray[np.uint8]]
    labels: Labels | None = None
    digests: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Examples:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        columns = {role: take_rows(values, chosen) for role, values in self.columns.items()}
        labels = None if self.labels is None else self.labels[chosen]
        return Examples(columns, labels, [self.digests[i] for i in chosen] if self.digests else ())

    def fingerprint(self) -> str:
        """SHA-256 over inputs and labels, in order."""
        digest = hashlib.sha256(",".join(self.columns).encode())
        digest.update(b"".join(self.digests))
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Splits:
    """The examples of a run.

    Attributes:
        fingerprint: SHA-256 over the contents of all splits, the columns used and the label names.
        label_names: name of each class number; empty if there are neither labels nor names.
        columns: role to the name of the column it was read from.
        available: all columns the data has.
        notes: what a careful reader of the data would remark, one line each.
    """

    train: Examples
    validation: Examples
    test: Examples | None
    fingerprint: str
    label_names: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    available: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def take_rows(values: Any, indices: npt.NDArray[np.int64]) -> Any:
    """The rows of a column at `indices`; arrays and images stay what they are."""
    if isinstance(values, np.ndarray):
        return values[indices]
    if isinstance(values, Images):
        return values.take(indices)
    return [values[i] for i in indices]


def join(first: Examples, second: Examples) -> Examples:
    """`first` followed by `second`; both have the same roles."""
    columns = {role: _join_rows(values, second.columns[role]) for role, values in first.columns.items()}
    labels = None
    if first.labels is not None or second.labels is not None:
        labels = np.concatenate([_labels_or_none(first), _labels_or_none(second)])
    return Examples(columns, labels, [*first.digests, *second.digests])


def _join_rows(first: Any, second: Any) -> Any:
    if isinstance(first, np.ndarray | Images):
        return Images([*Images.refs_of(first), *Images.refs_of(second)])
    return [*first, *second]


def _labels_or_none(examples: Examples) -> Labels:
    if examples.labels is None:
        return np.full(len(examples), UNLABELLED, dtype=np.int64)
    return examples.labels
