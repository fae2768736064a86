"""Noisy copies of texts."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.distill import Distill
from edgekd.distill.noise import with_noise
from edgekd.distill.recover import turns, with_copies
from edgekd.errors import RecipeError
from edgekd.tasks.text_classification import EncodedText

CLS, SEP = 1, 2
SPECIAL = (0, CLS, SEP)


def texts(*rows: list[int], types: list[list[int]] | None = None, longest: int = 16) -> EncodedText:
    lengths = np.array([len(row) for row in rows])
    return EncodedText(
        ids=np.concatenate(rows).astype(np.int32),
        types=None if types is None else np.concatenate(types).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=np.arange(len(rows)) % 2,
        padding=(0, 0),
        left=False,
        longest=longest,
    )


def many(count: int = 40) -> EncodedText:
    rng = np.random.default_rng(5)
    return texts(*([CLS, *rng.integers(10, 90, rng.integers(1, 15)).tolist(), SEP] for _ in range(count)))


def row(encoded: EncodedText, index: int) -> list[int]:
    start = encoded.starts[index]
    return encoded.ids[start : start + encoded.lengths[index]].tolist()


def test_the_texts_come_first_and_unchanged_and_versions_have_no_labels():
    plain = many()
    noisy = with_noise(plain, 3, SPECIAL, seed=0)
    assert len(noisy) == 4 * len(plain)
    assert [row(noisy, i) for i in range(40)] == [row(plain, i) for i in range(40)]
    assert noisy.take(np.arange(40)).fingerprint == plain.fingerprint
    assert plain.labels is not None
    assert noisy.labels is not None
    assert noisy.labels.tolist() == plain.labels.tolist() + [-1] * 120


def test_versions_differ_keep_their_frame_and_hold_only_words_of_the_texts():
    plain = many()
    noisy = with_noise(plain, 3, SPECIAL, seed=0)
    versions = [row(noisy, i) for i in range(40, 160)]
    words = set(plain.ids.tolist()) - set(SPECIAL)
    changed = sum(version != row(plain, i % 40) for i, version in enumerate(versions))
    assert changed > 60
    for version in versions:
        assert version[0] == CLS
        assert version[-1] == SEP
        assert len(version) <= plain.longest
        assert set(version[1:-1]) <= words
    assert len({len(version) for version in versions}) > 5


def test_the_seed_decides():
    plain = many()
    once, again, other = (with_noise(plain, 2, SPECIAL, seed=seed).fingerprint for seed in (0, 0, 1))
    assert once == again != other


def test_pairs_keep_their_separators_and_types():
    pair = [CLS, *range(10, 20), SEP, *range(30, 38), SEP]
    types = [0] * 12 + [1] * 9
    plain = texts(*[pair] * 30, types=[types] * 30, longest=40)
    noisy = with_noise(plain, 2, SPECIAL, seed=0)
    assert noisy.types is not None
    for i in range(30, 90):
        start, length = noisy.starts[i], noisy.lengths[i]
        ids, kinds = noisy.ids[start : start + length], noisy.types[start : start + length]
        first = ids.tolist().index(SEP)
        assert ids.tolist().count(SEP) == 2
        assert kinds.tolist() == [0] * (first + 1) + [1] * (length - first - 1)


def test_texts_without_words_stay():
    assert row(with_noise(texts([CLS, SEP]), 1, SPECIAL, seed=0), 1) == [CLS, SEP]


def test_an_epoch_takes_each_text_once_in_another_version():
    noisy = with_noise(many(), 2, SPECIAL, seed=0)
    epochs = [np.sort(np.concatenate(turns(noisy, 2, 8, seed=0, epoch=epoch))) for epoch in range(3)]
    for rows in epochs:
        assert np.sort(rows % 40).tolist() == list(range(40))
    assert np.sort(np.concatenate(epochs)).tolist() == list(range(120))
    assert 10 < (epochs[0] < 40).sum() < 20


def test_no_more_copies_than_epochs_can_use_and_none_for_images(text, image):
    text_ctx, image_ctx = text.ctx, image.ctx
    ctx, copies = with_copies(Distill(epochs=3, copies=5), text_ctx)
    assert copies == 2
    assert len(ctx.train) == 3 * len(text_ctx.train)
    assert with_copies(Distill(epochs=1, copies=5), text_ctx) == (text_ctx, 0)
    assert with_copies(Distill(epochs=9), text_ctx) == (text_ctx, 0)
    assert with_copies(Distill(), image_ctx) == (image_ctx, 0)
    with pytest.raises(RecipeError, match="only texts"):
        with_copies(Distill(copies=2), image_ctx)
