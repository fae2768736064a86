"""Losses on states of matched layers: one `[N, D]` per layer, N the valid tokens of the batch."""

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


def raw_hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over layers, the embeddings among them, of the mean squared difference of token vectors as they are.

    Kim et al. 2022, arXiv:2211.11014, as one part of its objective.
    """
    return _sum_of_mse(student, teacher)


def attention_output_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over layers of the mean squared difference of what attention gives: after projection, residual and LayerNorm.

    Kim et al. 2022, arXiv:2211.11014, which finds it or `attention_kl` better by task, large models this one. ADAPT: in
    layers that normalize first, as ViT's, the LayerNorm is the one before the feed-forward network.
    """
    return _sum_of_mse(student, teacher)


def _sum_of_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    parts = [(s.float() - t.detach().float()).square().mean() for s, t in zip(student, teacher, strict=True)]
    return reduce(add, parts)


FEATURE = table(
    Loss(name="hidden_mse", function=hidden_mse, needs=("hidden",)),
    Loss(name="squarehead", function=squarehead, needs=("hidden",)),
    Loss(name="raw_hidden_mse", function=raw_hidden_mse, needs=("states",)),
    Loss(name="attention_output_mse", function=attention_output_mse, needs=("outputs",)),
)
