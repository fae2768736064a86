"""Parametrizations that round a weight whenever it is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.quantize.fake.grid import best_clip, snap_weight, ternary

PACE = 2.0
"""How much faster than a weight a learned clip moves: an optimizer of Adam's kind moves all by the learning rate."""


class Symmetric(nn.Module):
    """8 or 4 bits per output channel, or per group of inputs.

    With 4 bits the largest magnitudes are cut where that makes the squared error less; how much is found once, and may
    be learned (ADAPT: as in LSQ, but tied to the row's largest magnitude, so that integers are found again).
    """

    clip: Tensor | None

    def __init__(self, weight: Tensor, *, bits: int, group: int, learned: bool) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        clip = best_clip(weight, bits=bits, group=group) if bits < 8 else None
        self.register_buffer("clip", clip)
        self.change = nn.Parameter(torch.zeros_like(clip)) if learned and clip is not None else None

    def forward(self, weight: Tensor) -> Tensor:
        """`[out, …]` -> the same, rounded."""
        clip: Tensor | float = 1.0 if self.clip is None else self.clip
        if self.change is not None:
            clip = (clip + PACE * self.change).clamp(0.1, 1.0)
        return snap_weight(weight, bits=self.bits, group=self.group, clip=clip)


class Ternary(nn.Module):
    """-a, 0 or a, with one a for the matrix."""

    def forward(self, weight: Tensor) -> Tensor:
        """`[out, …]` -> the same, rounded."""
        return ternary(weight)


def weight_quantizer(weight: Tensor, *, bits: int, group: int, learned: bool) -> nn.Module:
    """The parametrization for a weight `[out, …]`."""
    return Ternary() if bits == 2 else Symmetric(weight, bits=bits, group=group, learned=learned)
