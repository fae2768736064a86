"""Adaptive rounding: each weight goes up or down so that the layer's output stays as it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgekd.quantize.linear import Inputs, channel_scales, linear_layers

FLIPS = 1000
"""Weights of one output that may be turned to their other neighbour."""
GAIN = 1e-4
"""A flip must take at least this share off the error of the output."""


@torch.no_grad()
def round_adaptively(model: nn.Module, inputs: Mapping[str, Inputs], *, bits: int = 8) -> float:
    """Snap the weights of all linear layers to their grid, in place; return the mean error left over, nearest being 1.

    The problem is that of AdaRound (Nagel et al. 2020, arXiv 2004.10568), layer by layer against the float inputs:
    round up or down so that the squared error of the output is least, a quadratic form of the mean outer product of the
    inputs. ADAPT: it is solved by flipping one weight of every output at a time, the one that helps most, from nearest
    rounding on; so no layer gets worse, and nothing is left to tune. The largest weight of an output keeps its integer,
    so the graph's quantizer finds the same scale again.
    """
    ratios = []
    for name, layer in linear_layers(model).items():
        weight, second = layer.weight, inputs[name].second
        scale = channel_scales(weight, bits)
        found = adapted(weight, scale, second, 2 ** (bits - 1) - 1)
        plain = output_error(weight - torch.round(weight / scale) * scale, second)
        ratios.append(output_error(weight - found, second) / plain if plain > 0 else 1.0)
        layer.weight.copy_(found)
    return sum(ratios) / max(len(ratios), 1)


def output_error(change: Tensor, second: Tensor) -> float:
    """Mean squared output change of `[N, K]` under inputs of the second moment `[K, K]`."""
    return float(((change.detach() @ second) * change.detach()).sum())


def adapted(weight: Tensor, scale: Tensor, second: Tensor, most: int) -> Tensor:
    """Weights `[N, K]` on their grid `[N, 1]`, each at one of its two neighbours.

    Args:
        weight: float weights.
        scale: the step of each output.
        second: mean outer product of the inputs, `[K, K]`.
        most: the largest integer.
    """
    ratio = weight / scale
    steps = torch.round(ratio)
    other = torch.where(ratio >= steps, steps + 1, steps - 1)
    fixed = (other.abs() > most) | (steps.abs() >= most) | (ratio == steps)
    pull = ((steps - ratio) * scale) @ second  # half the gradient of the error
    rows = torch.arange(len(weight))
    for _ in range(FLIPS):
        move = (other - steps) * scale
        gain = -(2 * move * pull + move.square() * second.diagonal())
        gain[fixed] = 0
        best, column = gain.max(dim=1)
        size = ((steps - ratio) * scale * pull).sum(dim=1)
        going = best > GAIN * size.clamp(min=0)
        if not bool(going.any()):
            break
        where, which = rows[going], column[going]
        pull[where] += move[where, which][:, None] * second[which]
        steps[where, which], other[where, which] = other[where, which], steps[where, which]
    return steps * scale
