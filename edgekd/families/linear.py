"""Slicing of linear, embedding, convolution and norm modules: the one place where weights are cut."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Sliceable(Protocol):
    """A module that stands for a linear layer and slices itself, for instance a product of two matrices."""

    in_features: int
    out_features: int

    def rows(self, keep: torch.Tensor) -> nn.Module:
        """The module with output features `keep [n]` alone."""

    def columns(self, keep: torch.Tensor) -> nn.Module:
        """The module with input features `keep [n]` alone."""


def matrix(root: nn.Module, path: str) -> nn.Linear | Sliceable:
    """The linear layer, or what stands for one, at a dotted path.

    Raises:
        TypeError: there is a module of another kind.
    """
    module = root.get_submodule(path)
    if not isinstance(module, (nn.Linear, Sliceable)):
        raise TypeError(f"{path} is a {type(module).__name__}, not a Linear")
    return module


def has(root: nn.Module, path: str) -> bool:
    """Whether there is a module or a parameter at a dotted path."""
    part: object = root
    for name in path.split("."):
        part = getattr(part, name, None)
    return part is not None


def put(root: nn.Module, path: str, module: nn.Module | nn.Parameter) -> None:
    """Put a module or a parameter at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def rows(layer: nn.Linear | Sliceable, keep: torch.Tensor) -> nn.Module:
    """Keep output features `keep [n]` of a linear layer: weight `[out, in]` -> `[n, in]`."""
    if not isinstance(layer, nn.Linear):
        return layer.rows(keep)
    bias = None if layer.bias is None else layer.bias.data[keep]
    return _linear(layer.weight.data[keep], bias)


def columns(layer: nn.Linear | Sliceable, keep: torch.Tensor) -> nn.Module:
    """Keep input features `keep [n]` of a linear layer: weight `[out, in]` -> `[out, n]`; the bias stays."""
    if not isinstance(layer, nn.Linear):
        return layer.columns(keep)
    return _linear(layer.weight.data[:, keep], None if layer.bias is None else layer.bias.data)


def embedding(table: nn.Embedding, keep: torch.Tensor) -> nn.Embedding:
    """Keep features `keep [n]` of a table: `[rows, features]` -> `[rows, n]`."""
    weight = table.weight.data[:, keep]
    return nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=table.padding_idx, _weight=weight)


def layer_norm(layer: nn.LayerNorm, keep: torch.Tensor) -> nn.LayerNorm:
    """Keep channels `keep [n]` of a layer normalization, which then takes its statistics over these alone."""
    affine, biased = layer.elementwise_affine, layer.bias is not None
    cut = nn.LayerNorm(len(keep), eps=layer.eps, elementwise_affine=affine, bias=biased)
    if affine:
        cut.weight = nn.Parameter(layer.weight.data[keep])
    if biased:
        cut.bias = nn.Parameter(layer.bias.data[keep])
    return cut


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
    return cut.train(layer.training)


def spread(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Feature indices `[h * head_dim]` of the heads `[h]`, in their order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)[None, :]).reshape(-1)
