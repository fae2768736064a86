"""What edgekd must know of an architecture family to read, cut and rebuild its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its residual layers and how their inner shapes are read and sliced.

    All functions get the transformers model (with head) or one residual layer of it. Slicing keeps the chosen
    indices in the order given and replaces the modules in place, so the layer gets physically smaller.
    """

    name: str
    model_types: tuple[str, ...]
    layers: Callable[[nn.Module], list[nn.Module]]
    """All residual layers, in order."""
    set_layers: Callable[[nn.Module, list[int]], None]
    """Keep only these layers (indices, ascending) and make the config agree."""
    droppable: Callable[[nn.Module, int], bool]
    """`(model, index)`: whether the layer keeps its input's shape, so that it may be left out."""
    heads: Callable[[nn.Module], int]
    """Attention heads of a layer; 0 where it has none."""
    neurons: Callable[[nn.Module], int]
    """Inner width of a layer."""
    slice_heads: Callable[[nn.Module, torch.Tensor, int], None]
    """`(layer, kept heads [h], head_dim)`."""
    slice_neurons: Callable[[nn.Module, torch.Tensor], None]
    """`(layer, kept neurons [n])`."""
    head_input: Callable[[nn.Module], nn.Module | None]
    """The module whose input is the concatenated heads, `[B, S, heads * head_dim]`."""
    neuron_input: Callable[[nn.Module], nn.Module]
    """The module whose input is the inner activation, `[B, S, neurons]` or `[B, neurons, H, W]`."""
    qkv: Callable[[nn.Module], tuple[nn.Module, nn.Module, nn.Module]] | None
    """The query, key and value projections of a layer, where it has them."""
    embeddings: Callable[[nn.Module], nn.Module]
    """The module that turns the input into the first hidden state's main part (word table or patch projection)."""
    hidden: Callable[[nn.Module], int]
    """Width of the residual stream (of the last stage for a convolutional net)."""
    head_dim: Callable[[nn.Module], int]
    """Width of one attention head; 0 where there are none."""
