"""Matrices as products of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A linear layer whose weight is the product of two: `second [out, rank] @ first [rank, in]`."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.first.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.second.out_features

    @property
    def rank(self) -> int:
        """Width between the two factors."""
        return self.first.out_features

    @property
    def weight(self) -> Tensor:
        """The product `[out, in]`, worked out anew at every call."""
        return self.second.weight @ self.first.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias `[out]`, if there is one."""
        return self.second.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        outputs: Tensor = self.second(self.first(inputs))
        return outputs

    def rows(self, keep: Tensor) -> LowRank:
        """The same with output features `keep [n]` alone."""
        bias = None if self.bias is None else self.bias.data[keep]
        return LowRank(_linear(self.first.weight.data), _linear(self.second.weight.data[keep], bias))

    def columns(self, keep: Tensor) -> LowRank:
        """The same for input features `keep [n]` alone."""
        bias = None if self.bias is None else self.bias.data
        return LowRank(_linear(self.first.weight.data[:, keep]), _linear(self.second.weight.data, bias))

    def dense(self) -> nn.Linear:
        """One ordinary linear layer that computes the same."""
        return _linear(self.weight.detach(), None if self.bias is None else self.bias.data)


def pays(linear: nn.Linear | LowRank, rank: int) -> bool:
    """Whether two factors of this inner size have fewer weights than the matrix."""
    into, out = linear.in_features, linear.out_features
    return 0 < rank * (into + out) < into * out


def factorise(linear: nn.Linear, rank: int, moments: Tensor | None = None) -> LowRank:
    """The best approximation of a linear layer by two factors: W ≈ (U√Σ)(√Σ Vᵀ), cut after `rank` singular values.

    With the inputs' second moments `moments [in, in]`, the mean of x xᵀ, the expected squared error of the output is
    least, not that of the weight. Guo et al. 2023, "PELA: Learning Parameter-Efficient Models with Low-Rank
    Approximation", arXiv:2310.10700; ADAPT: the weighting by moments is not in the paper.
    """
    rank = min(rank, linear.in_features, linear.out_features)
    weight = linear.weight.data.double()
    root = None if moments is None else _root(moments.double())
    left, sizes, right = torch.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
    scale = sizes[:rank].sqrt()
    second, first = left[:, :rank] * scale, scale[:, None] * right[:rank]
    if root is not None:
        first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
    kind = linear.weight.dtype
    bias = None if linear.bias is None else linear.bias.data
    return LowRank(_linear(first.to(kind)), _linear(second.to(kind), bias))


def unfilled(linear: nn.Linear, rank: int) -> LowRank:
    """Factors of the right shapes whose weights are still to be loaded."""
    bias = None if linear.bias is None else linear.bias.data
    first, second = torch.zeros(rank, linear.in_features), torch.zeros(linear.out_features, rank)
    return LowRank(_linear(first), _linear(second, bias))


def _root(moments: Tensor) -> Tensor:
    """Lower triangular L with L Lᵀ = moments, made invertible where inputs are always zero."""
    ridge = 1e-6 * moments.diagonal().mean().clamp_min(1e-12)
    root: Tensor = torch.linalg.cholesky(moments + ridge * torch.eye(len(moments), dtype=moments.dtype))
    return root


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
