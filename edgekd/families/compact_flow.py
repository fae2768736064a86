"""What the layers of one model tell each other within a forward pass, and which tokens they keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgekd.families.compact_ops import choose

FIRST = 1e9
"""The score of the first token, which always stays."""


class Flow:
    """Shared by the layers of one model; a copy of the model has one of its own.

    `kept` holds the positions `[B, k]` (int64, ascending) of the tokens that are left, by the index in
    `output_hidden_states` from which on they are; `probabilities` the attention `[B, heads, S, S]` for the next layer.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.begin()

    def begin(self) -> None:
        """Forget the pass before."""
        self.kept: dict[int, Tensor] = {}
        self.mask: Tensor | None = None
        self.probabilities: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Flow:
        """An empty one: tensors of a pass are of no use to a copy, and those with gradients cannot be copied."""
        return Flow(self.first)

    def masked(self, mask: Tensor | None) -> Tensor | None:
        """The mask for the tokens that are left."""
        return self.mask if self.kept else mask

    def keep(self, index: int, chosen: Tensor, mask: Tensor | None) -> None:
        """From hidden state `index` on only `chosen [B, k]` of the present tokens are left."""
        before = self.latest()
        self.mask = None if mask is None else _picked_mask(mask, chosen)
        self.kept[index] = chosen if before is None else before.gather(1, chosen)

    def latest(self, index: int | None = None) -> Tensor | None:
        """Positions of the tokens of hidden state `index` (default: of the last); None while all are there."""
        found = [at for at in self.kept if index is None or at <= index]
        return self.kept[max(found)] if found else None


def valid(mask: Tensor | None) -> Tensor | None:
    """Which tokens are no padding, bool `[B, S]`, of a mask in any form that encoders pass on."""
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask != 0
    row = mask[:, 0, 0]
    return row if row.dtype == torch.bool else row > -1.0


def most_attended(probabilities: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The first token and the `count - 1` that get the most attention: positions `[B, min(count, S)]`, ascending.

    The attention `[B, heads, S, S]` that a token gets is summed over heads and over the queries that are no padding;
    padding comes last. Goyal et al. 2020, "PoWER-BERT: Accelerating BERT Inference via Progressive Word-vector
    Elimination", arXiv:2001.08950.
    """
    probabilities, real = probabilities.detach(), valid(mask)
    if real is None:
        scores = probabilities.sum((1, 2))
    else:
        queries = real[:, None, None, :].to(probabilities.dtype)
        scores = (queries @ probabilities).sum((1, 2)).masked_fill(~real, -1.0)
    return choose(torch.nn.functional.pad(scores[:, 1:], (1, 0), value=FIRST), count)


def _picked_mask(mask: Tensor, chosen: Tensor) -> Tensor:
    if mask.dim() == 2:
        return mask.gather(1, chosen)
    return mask[:, 0, 0].gather(1, chosen)[:, None, None, :]
