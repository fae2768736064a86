"""Noisy copies of texts: more inputs on which to ask the teacher, where the task has few of its own.

Words are deleted and replaced, texts are cropped and spliced, all on token ids. Nobody needs to know the label of the
result, because the teacher says what it thinks of it: distillation on transfer data (Turc et al. 2019, arXiv
1908.08962) with noise in the manner of EDA (Wei and Zou 2019, arXiv 1901.11196). ADAPT: the operations and their rates
are ours.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgekd.tasks.text_classification import EncodedText

Columns = npt.NDArray[np.int32]
"""Tokens of one text [2, S]: ids, and token type ids (zeros where the model takes none)."""

SPLICED, CROPPED = 0.3, 0.5
"""Shares of texts: up to the first, a text ends as another one does; from there to the second, a part is cut out."""
MOST_NOISE = 0.2
"""The share of words deleted or replaced is drawn anew for every text between 0 and this, half of it for each."""
FEWEST = 6
"""Texts of no more words than this are neither cropped nor spliced."""


def with_noise(texts: EncodedText, copies: int, special: Collection[int], *, seed: int) -> EncodedText:
    """The N texts, followed by `copies` noisy versions of all: version v of text i is example `v * N + i`.

    Special tokens stay. Texts with special tokens inside (pairs) are neither cropped nor spliced. The versions have
    no labels (-1).

    Args:
        texts: encoded examples.
        copies: how many versions.
        special: token ids that are not words.
        seed: the same seed gives the same versions.
    """
    made = originals = [_columns(texts, i) for i in range(len(texts))]
    noise = _Noise(originals, sorted(special), texts.longest, np.random.default_rng(seed))
    made = [*originals, *(noise(columns) for _ in range(copies) for columns in originals)]
    lengths = np.array([columns.shape[1] for columns in made], dtype=np.int64)
    joined = np.concatenate(made, axis=1) if made else np.zeros((2, 0), np.int32)
    unknown = np.full(copies * len(texts), -1, dtype=np.int64)
    return replace(
        texts,
        ids=joined[0],
        types=None if texts.types is None else joined[1],
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=None if texts.labels is None else np.concatenate([texts.labels, unknown]),
        rows=None,
        picked=None,
    )


def _columns(texts: EncodedText, index: int) -> Columns:
    part = slice(int(texts.starts[index]), int(texts.starts[index] + texts.lengths[index]))
    ids = texts.ids[part]
    return np.stack([ids, np.zeros_like(ids) if texts.types is None else texts.types[part]])


class _Noise:
    """Draws a version of a text; words come from the texts themselves, as often as they occur there."""

    def __init__(self, texts: list[Columns], special: list[int], longest: int, rng: np.random.Generator) -> None:
        self.texts, self.special, self.longest, self.rng = texts, special, longest, rng
        every = np.concatenate([columns[0] for columns in texts]) if texts else np.zeros(0, np.int32)
        self.words = every[~np.isin(every, special)]

    def __call__(self, columns: Columns) -> Columns:
        words = np.flatnonzero(~np.isin(columns[0], self.special))
        if len(words) > FEWEST and words[-1] - words[0] + 1 == len(words):
            first, end = int(words[0]), int(words[-1]) + 1
            body = self._reshaped(columns[:, first:end], most=self.longest - columns.shape[1] + len(words))
            columns = np.concatenate([columns[:, :first], body, columns[:, end:]], axis=1)
        return self._disturbed(columns)

    def _reshaped(self, body: Columns, most: int) -> Columns:
        draw, size = self.rng.random(), body.shape[1]
        if draw < SPLICED:
            other = self.texts[int(self.rng.integers(len(self.texts)))]
            other = other[:, ~np.isin(other[0], self.special)]
            head = body[:, : int(self.rng.integers(size // 2, size + 1))]
            tail = other[:, int(self.rng.integers(0, other.shape[1] // 2 + 1)) :].copy()
            tail[1] = body[1, 0]
            return np.concatenate([head, tail], axis=1)[:, :most]
        if draw < CROPPED:
            kept = int(self.rng.integers(max(size // 2, FEWEST), size + 1))
            start = int(self.rng.integers(0, size - kept + 1))
            return body[:, start : start + kept]
        return body

    def _disturbed(self, columns: Columns) -> Columns:
        draws, rate = self.rng.random(columns.shape[1]), self.rng.uniform(0, MOST_NOISE / 2)
        word = ~np.isin(columns[0], self.special)
        replaced = word & (draws > 1 - rate)
        columns = columns.copy()
        columns[0, replaced] = self.words[self.rng.integers(max(len(self.words), 1), size=int(replaced.sum()))]
        return columns[:, ~(word & (draws < rate))]
