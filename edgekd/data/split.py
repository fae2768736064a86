"""Holding out a validation split, and keeping what is held out apart from what is trained on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekd.data.examples import Examples
from edgekd.errors import DataError


def hold_out(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """(the rest, held out): about `fraction` of the distinct inputs, chosen by their SHA-256.

    The choice depends on the contents alone, never on the order of the rows; equal inputs stay on one side. Where
    some rows have labels, only these are held out.

    Raises:
        DataError: the fraction is not between 0 and 1, or there are fewer than two distinct inputs.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction is {fraction}; expected a number between 0 and 1, such as 0.1")
    distinct = set(examples.digests)
    if len(distinct) < 2:
        raise DataError(
            f"{len(examples)} training rows hold {len(distinct)} distinct input, too few to hold out a validation "
            "split; give more rows, or a validation file"
        )
    usable = distinct
    if examples.labels is not None:
        usable = {key for key, label in zip(examples.digests, examples.labels, strict=True) if label >= 0}
    count = min(max(1, round(fraction * len(usable))), len(distinct) - 1)
    chosen = set(sorted(usable)[:count])
    held = np.array([key in chosen for key in examples.digests])
    if examples.labels is not None:
        rest, out = np.flatnonzero(~held), np.flatnonzero(held & (examples.labels >= 0))
    else:
        rest, out = np.flatnonzero(~held), np.flatnonzero(held)
    return examples.take(rest), examples.take(out)


def without_repeats(examples: Examples, seen: set[bytes]) -> Examples:
    """The examples whose input neither is in `seen` nor came before."""
    first = {key: row for row, key in reversed(list(enumerate(examples.digests)))}
    return examples.take(sorted(row for key, row in first.items() if key not in seen))


def overlaps(splits: Mapping[str, Examples]) -> list[str]:
    """One line for each two splits that share inputs."""
    lines = []
    names = list(splits)
    for index, name in enumerate(names):
        seen = set(splits[name].digests)
        for other in names[index + 1 :]:
            count = sum(key in seen for key in splits[other].digests)
            if count:
                lines.append(f"{count:,} of {len(splits[other]):,} {other} rows are in the {name} split too")
    return lines


def limited(examples: Examples, limit: int | None, seed: int) -> Examples:
    """The first `limit` examples of a shuffle.

    Raises:
        DataError: the limit is not positive.
    """
    if limit is None:
        return examples
    if limit < 1:
        raise DataError(f"limit is {limit}; expected at least 1, or nothing to take all rows")
    if limit >= len(examples):
        return examples
    return examples.take(np.random.default_rng(seed).permutation(len(examples))[:limit])
