"""What edgekd must know of an architecture family to read, cut and rebuild its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgekd.families.encoder import Places


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its residual layers and how their inner shapes are read and sliced.

    All functions get the transformers model (with head) or one residual layer of it. Slicing keeps the chosen
    indices in the order given and replaces the modules in place, so the layer gets physically smaller.

    Decoders with grouped-query attention would fit without a new kind of shape: a layer's `heads` would be its
    key/value groups, `slice_heads` would keep the rows of the key and value projections of a group together with those
    of all query heads that read it, and `head_dim` would stay the width of one head; `head_input` would score the
    heads of a group together.
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
    """Width of the residual stream (of the last stage for a convolutional net), read from its matrices."""
    head_dim: Callable[[nn.Module], int]
    """Width of one attention head; 0 where there are none."""
    slice_hidden: Callable[[nn.Module, torch.Tensor], None] | None = None
    """`(model, kept channels of the residual stream [h])`; the head's inner width and `config` stay. None: impossible.

    Raises ModelError where edgekd does not know what the head reads.
    """
    channels: Callable[[nn.Module], tuple[int, ...]] = lambda model: ()
    """Widths of the embedder and of each stage of a convolutional net; empty for others."""
    slice_channels: Callable[[nn.Module, int, torch.Tensor], None] | None = None
    """`(model, index into channels, kept channels [c])`: cuts all that carries this stage's residual stream.

    Where the embedder and the first stage share one stream, both are cut. None: impossible.
    """
    channel_sources: Callable[[nn.Module, int], list[nn.Module]] = lambda model, index: []
    """The norms (or convolutions, without any) that write a stage's residual stream, `(model, index into channels)`."""
    align: Callable[[nn.Module, torch.Tensor], None] = lambda layer, keep: None
    """`(layer, neurons to keep [n])`: moves the best of inner channels that are no neurons to the same places.

    In place; the layer computes what it did.
    """
    norms: Callable[[nn.Module], list[str]] = lambda layer: []
    """Paths, from a layer, of its normalizations over the residual stream."""
    reads_first: Callable[[nn.Module], bool] = lambda model: False
    """Whether the head reads the first token of the last hidden state and no other."""
    places: Places | None = None
    """Where an encoder's modules are; None for a family of another kind."""
