"""Losses on hidden states of matched layers: one `[N, D]` per layer, N the valid tokens of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from edgekd.distill.losses.loss import Loss, table

if TYPE_CHECKING:
    from torch import Tensor


def hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of token vectors, each brought to mean 0 and variance 1 first; mean over layers."""
    from torch.nn.functional import layer_norm, mse_loss

    def normalize(states: Tensor) -> Tensor:
        return layer_norm(states.float(), states.shape[-1:])

    parts = [mse_loss(normalize(s), normalize(t.detach())) for s, t in zip(student, teacher, strict=True)]
    return reduce(add, parts) / len(parts)


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over layers of the mean squared difference divided by the mean square of the teacher's states.

    Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models", arXiv:2310.06927.
    """
    parts = [
        (s.float() - t.detach().float()).square().mean() / (t.detach().float().square().mean() + 1e-8)
        for s, t in zip(student, teacher, strict=True)
    ]
    return reduce(add, parts)


FEATURE = table(
    Loss(name="hidden_mse", function=hidden_mse, needs=("hidden",)),
    Loss(name="squarehead", function=squarehead, needs=("hidden",)),
)
