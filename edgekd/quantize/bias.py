"""Bias correction: what rounded weights add to the mean output of a layer is taken off its bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from edgekd.quantize.linear import Inputs, changed_layers

Rounding = Callable[[str, Tensor], Tensor]
"""`(name, weight [N, K])`: the weights as they will run."""


def as_they_are(name: str, weight: Tensor) -> Tensor:
    """For weights that are rounded already."""
    return weight


@torch.no_grad()
def correct_biases(before: nn.Module, after: nn.Module, inputs: Mapping[str, Inputs], rounding: Rounding) -> int:
    """Add `(W - Q(W)) E[x]` to the biases of `after`, in place, and return how many there were.

    Nagel et al. 2019, arXiv 1906.04721, with the means measured on calibration data instead of told by batch
    normalization: ADAPT. Errors of rounded activations are not looked at.

    Args:
        before: the float model.
        after: its copy, whose weights may be rounded already.
        inputs: what goes into the layers of the float model.
        rounding: what becomes of the weights of `after`.
    """
    count = 0
    for name, old, new in changed_layers(before, after):
        if new.bias is not None:
            new.bias.add_((old.weight - rounding(name, new.weight)) @ inputs[name].mean)
            count += 1
    return count
