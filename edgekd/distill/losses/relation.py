"""Losses on relations between the samples of a batch; widths may differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.distill.losses.loss import Loss, table

if TYPE_CHECKING:
    from torch import Tensor


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """Relational KD: smooth L1 between normalized distances `[B, B]` and between angles `[B, B, B]`.

    Memory grows with B³: keep B at most 128. Park et al. 2019, arXiv:1904.05068.
    """
    student, teacher = student.float(), teacher.detach().float()
    distances = _smooth_l1(_distances(student), _distances(teacher))
    return distance * distances + angle * _smooth_l1(_angles(student), _angles(teacher))


def _smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    difference = (a - b).abs()
    near = difference.clamp(max=1)
    return (near * difference - 0.5 * near.square()).mean()


def _distances(embeddings: Tensor) -> Tensor:
    """Pairwise Euclidean distances over the mean of the positive ones."""
    squared = (embeddings[:, None] - embeddings[None]).square().sum(-1)
    distances = squared.clamp_min(1e-12).sqrt() * (squared > 0)
    return distances / (distances.sum() / (squared > 0).sum().clamp_min(1)).clamp_min(1e-12)


def _angles(embeddings: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, `[j, i, k]`."""
    differences = embeddings[None] - embeddings[:, None]
    squared = differences.square().sum(-1, keepdim=True)
    directions = differences / squared.clamp_min(1e-12).sqrt()
    return directions @ directions.transpose(1, 2)


RELATION = table(
    Loss(name="rkd", function=rkd, needs=("embedding",)),
)
