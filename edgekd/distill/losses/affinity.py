"""Losses on how alike the positions of an image are: features `[B, positions, channels]`, channels may differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from edgekd.distill.losses.loss import Loss, table

if TYPE_CHECKING:
    from torch import Tensor


def feature_affinity(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over stages of the mean absolute difference of cosines between all pairs of positions `[P, P]`.

    Li et al. 2023, "Feature Affinity Assisted Knowledge Distillation and Quantization of Deep Neural Networks on
    Label-Free Data", arXiv:2302.10899; weight 0.1 there. ADAPT: the mean over the examples of a batch, not their sum;
    positions of a transformer are its patches, without special tokens.
    """

    def gram(rows: Tensor) -> Tensor:
        return rows @ rows.transpose(1, 2)

    parts = [(gram(_unit(s)) - gram(_unit(t.detach()))).abs().mean() for s, t in zip(student, teacher, strict=True)]
    return reduce(add, parts)


def feature_affinity_fast(student: Sequence[Tensor], teacher: Sequence[Tensor], *, columns: int = 15) -> Tensor:
    """`feature_affinity` of random projections: N Nᵀ z in place of N Nᵀ, with z ~ N(0, 1) `[P, columns]`.

    It takes P·channels·columns products, not P²·channels. Sums over positions, mean over columns, over P². Noise is
    fresh at every call, from torch's generator. The same paper. ADAPT: mean over examples; noise of each call.
    """
    import torch

    parts = []
    for s, t in zip(student, teacher, strict=True):
        positions = s.shape[1]
        noise = torch.randn(positions, int(columns), device=s.device)
        ours, theirs = _unit(s), _unit(t.detach())
        difference = ours @ (ours.transpose(1, 2) @ noise) - theirs @ (theirs.transpose(1, 2) @ noise)
        parts.append(difference.abs().sum(1).mean() / positions**2)
    return reduce(add, parts)


def _unit(rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows / (rows.square().sum(-1, keepdim=True) + 1e-10).sqrt()


AFFINITY = table(
    Loss(name="feature_affinity", function=feature_affinity, needs=("features",)),
    Loss(name="feature_affinity_fast", function=feature_affinity_fast, needs=("features",)),
)
