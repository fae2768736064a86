"""Slicing of linear, convolution and batch-norm modules: the one place where weights are cut."""

from __future__ import annotations

import torch
from torch import nn


def rows(layer: nn.Linear, keep: torch.Tensor) -> nn.Linear:
    """Keep output features `keep [n]` of a linear layer: weight `[out, in]` -> `[n, in]`."""
    bias = None if layer.bias is None else layer.bias.data[keep]
    return _linear(layer.weight.data[keep], bias)


def columns(layer: nn.Linear, keep: torch.Tensor) -> nn.Linear:
    """Keep input features `keep [n]` of a linear layer: weight `[out, in]` -> `[out, n]`; the bias stays."""
    return _linear(layer.weight.data[:, keep], None if layer.bias is None else layer.bias.data)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def convolution(layer: nn.Conv2d, *, out: torch.Tensor | None = None, into: torch.Tensor | None = None) -> nn.Conv2d:
    """Keep output channels `out` and input channels `into` of an ungrouped convolution."""
    weight = layer.weight.data
    weight = weight if out is None else weight[out]
    weight = weight if into is None else weight[:, into]
    cut = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        (layer.kernel_size[0], layer.kernel_size[1]),
        stride=(layer.stride[0], layer.stride[1]),
        padding=layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
        bias=layer.bias is not None,
    )
    cut.weight = nn.Parameter(weight.clone())
    if layer.bias is not None:
        cut.bias = nn.Parameter(layer.bias.data.clone() if out is None else layer.bias.data[out].clone())
    return cut


def batch_norm(layer: nn.BatchNorm2d, keep: torch.Tensor) -> nn.BatchNorm2d:
    """Keep channels `keep [n]` of a batch normalization, running statistics included."""
    cut = nn.BatchNorm2d(len(keep), eps=layer.eps, momentum=layer.momentum)
    cut.load_state_dict({name: value[keep] if value.dim() else value for name, value in layer.state_dict().items()})
    return cut


def spread(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Feature indices `[h * head_dim]` of the heads `[h]`, in their order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)[None, :]).reshape(-1)
