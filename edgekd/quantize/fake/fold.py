"""Batch normalization folded into the convolution before it, as runtimes do, so that both round the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def folded(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Fold every normalization that follows a convolution, in place, and return these normalizations.

    The convolution takes the scale; the normalization stays as a module, because a bias has no other place in such
    models, but all it still does is to add one: mean 0, variance 1, scale 1. The model computes what it did in
    `eval()` mode. Folding again changes nothing.
    """
    norms = []
    for module in model.modules():
        convolution, norm = getattr(module, "convolution", None), getattr(module, "normalization", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            _fold(convolution, norm)
            norms.append(norm)
    return norms


@torch.no_grad()
def _fold(convolution: nn.Conv2d, norm: Any) -> None:
    mean, variance = norm.running_mean, norm.running_var
    scale: Tensor = norm.weight * (variance + norm.eps).rsqrt()
    convolution.weight.mul_(scale[:, None, None, None])
    if convolution.bias is not None:
        convolution.bias.mul_(scale)
    norm.bias.sub_(mean * scale)
    norm.weight.fill_(1.0)
    mean.zero_()
    variance.fill_(1.0 - norm.eps)
