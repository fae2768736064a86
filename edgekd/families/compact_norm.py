"""A scale and a shift per channel in the place of LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """NoNorm: `weight * x + bias`, per channel `[D]`.

    Sun et al. 2020, "MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices", arXiv:2004.02984.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        """The width, as LayerNorm states it."""
        return tuple(self.weight.shape)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        return inputs * self.weight + self.bias

    def rows(self, keep: Tensor) -> Affine:
        """The same for channels `keep [n]` alone."""
        return Affine(self.weight.data[keep], self.bias.data[keep])


def affine_of(norm: nn.LayerNorm) -> Affine:
    """A scale and shift with the weights of a LayerNorm, which fit where its input has mean 0 and variance 1."""
    width = int(norm.normalized_shape[0])
    weight = torch.ones(width) if norm.weight is None else norm.weight.data
    return Affine(weight, torch.zeros(width) if norm.bias is None else norm.bias.data)
