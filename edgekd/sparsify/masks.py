"""Which weights of a matrix stay, by scores: pure functions on tensors, masks true where a weight stays."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.sparsify.patterns import Pattern


def keep_best(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of all scores, the earlier ones at a tie: a mask of the same shape."""
    flat = scores.flatten()
    mask = torch.zeros(len(flat), dtype=torch.bool, device=scores.device)
    mask[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    return mask.view_as(scores)


def keep_best_of_each(scores: Tensor, count: int) -> Tensor:
    """The `count` highest along the last axis."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def of_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """N:M: of every `group` neighbours along the inputs of `scores [D, F]` the best `kept`."""
    rows, columns = scores.shape
    return keep_best_of_each(scores.view(rows, columns // group, group), kept).view(rows, columns)


def block_scores(scores: Tensor, rows: int, columns: int) -> Tensor:
    """Sums over blocks: `[D, F]` -> `[D / rows, F / columns]`."""
    height, width = scores.shape
    return scores.reshape(height // rows, rows, width // columns, columns).sum((1, 3))


def of_blocks(chosen: Tensor, rows: int, columns: int) -> Tensor:
    """The mask of the weights in the chosen blocks."""
    return chosen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def choose(scores: Tensor, pattern: Pattern, density: float, *, by_row: bool = False) -> Tensor:
    """The mask `[D, F]` of a pattern that keeps the weights of the highest scores.

    Args:
        scores: `[D, F]`, the more the worthier; of a block the sum counts.
        pattern: where zeros may stand.
        density: the share that stays. Of an N:M pattern it is rounded up to whole weights of a group, so that masks
            on the way to the final ones have more of them.
        by_row: weights are compared within each output only, as Wanda does it; not for blocks.
    """
    if pattern.is_grouped:
        return of_groups(scores, max(_rounded_up(density * pattern.group), pattern.kept), pattern.group)
    if pattern.is_blocked:
        sums = block_scores(scores, pattern.rows, pattern.columns)
        return of_blocks(keep_best(sums, round(density * sums.numel())), pattern.rows, pattern.columns)
    if by_row:
        return keep_best_of_each(scores, round(density * scores.shape[1]))
    return keep_best(scores, round(density * scores.numel()))


def _rounded_up(number: float) -> int:
    return int(-(-(number - 1e-9) // 1))
