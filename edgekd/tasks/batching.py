"""Batches of examples of like length."""

from __future__ import annotations

import numpy as np

from edgekd.tasks.task import Encoded, Ints

# Batches sorted together: enough for little padding, few enough that a batch is a fresh mix in every epoch.
_POOL = 256


def batches(encoded: Encoded, batch_size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> list[Ints]:
    """Index arrays that hold every example once: a function of the lengths, `seed` and `epoch` alone.

    Shuffled, pools of 256 batches are drawn at random, each is sorted by length and cut into batches, and the order
    of all batches is shuffled. If one example is left over, another joins it: batch normalization over a single value
    is not defined. Otherwise everything is sorted by length once, longest last, equal lengths in order.

    Raises:
        ValueError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    lengths = np.asarray(encoded.lengths)
    if not shuffle:
        return _cut(np.argsort(lengths, kind="stable").astype(np.int64), batch_size)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).astype(np.int64)
    pools = _cut(order, batch_size * _POOL)
    cut = [batch for pool in pools for batch in _cut(pool[np.argsort(lengths[pool], kind="stable")], batch_size)]
    if len(cut) > 1 and len(cut[-1]) == 1 and batch_size > 2:
        cut[-2:] = [cut[-2][:-1], np.concatenate([cut[-2][-1:], cut[-1]])]
    return [cut[index] for index in generator.permutation(len(cut))]


def _cut(indices: Ints, size: int) -> list[Ints]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
