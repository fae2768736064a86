"""Losses on queries, keys and values, and on the maps that come of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from edgekd.distill.losses.loss import Loss, table

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-8
"""The least probability whose logarithm is taken."""


def minilm(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
    *,
    relation_heads: int = 48,
    teacher_layer: int = 0,
) -> Tensor:
    """KL between the Q-Q, K-K and V-V relations of one layer; mean over relation heads and valid tokens, summed.

    Queries, keys and values come as `[B, S, D]` with all heads side by side and are split into relation heads
    again, so widths and head counts may differ: the number of relation heads is the largest common divisor of both
    widths that does not exceed `relation_heads`. Padded rows and columns are left out. The student's layer is the last,
    the teacher's the one that `teacher_layer` says, counted from 1 (0: the last; for large teachers the paper takes an
    upper middle one, 21 of 24): the wiring has chosen them before queries, keys and values come here.

    Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation", arXiv:2012.15828.
    """
    heads = _common_heads(student[0].shape[-1], teacher[0].shape[-1], relation_heads)
    parts = [
        _relation_kl(_relations(s.float(), mask, heads), _relations(t.detach().float(), mask, heads), mask)
        for s, t in zip(student, teacher, strict=True)
    ]
    return reduce(add, parts)


def _common_heads(student: int, teacher: int, most: int) -> int:
    common = math.gcd(student, teacher)
    return max(heads for heads in range(1, min(common, most) + 1) if common % heads == 0)


def _relations(states: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Log-softmax of scaled dot products between tokens: `[B, S, D]` -> `[B, heads, S, S]`."""
    batch, tokens, width = states.shape
    split = states.view(batch, tokens, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    # A large finite value keeps the gradient of fully padded rows finite.
    return scores.masked_fill(~mask[:, None, None, :], -1e9).log_softmax(-1)


def _relation_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    rows = (teacher.exp() * (teacher - student)).sum(-1).mean(1)
    return rows[mask].mean()


def attention_kl(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Σ over layers of KL(teacher ‖ student) of attention maps `[B, heads, S, S]` after the softmax.

    Of each example only the block of valid tokens counts, mean over its query rows, then over heads and examples.
    Probabilities are at least 1e-8. Kim et al. 2022, arXiv:2211.11014.
    """
    block = mask[:, None, :, None] & mask[:, None, None, :]
    parts = [_map_kl(s, t.detach(), block, mask.sum(1)) for s, t in zip(student, teacher, strict=True)]
    return reduce(add, parts)


def _map_kl(student: Tensor, teacher: Tensor, block: Tensor, lengths: Tensor) -> Tensor:
    student, teacher = student.float().clamp_min(LEAST), teacher.float().clamp_min(LEAST)
    each = (teacher * (teacher.log() - student.log())).masked_fill(~block, 0.0)
    return (each.sum((2, 3)) / lengths[:, None]).mean()


ATTENTION = table(
    Loss(name="minilm", function=minilm, needs=("qkv", "mask")),
    Loss(name="attention_kl", function=attention_kl, needs=("maps", "mask")),
)
