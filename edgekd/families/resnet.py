"""ResNet: the inner channels of each residual block, the blocks that keep their input's shape, the widths of stages."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from edgekd.families import groups
from edgekd.families.family import Family
from edgekd.families.linear import batch_norm, convolution

BOTTLENECK = 3
"""Convolutions of a block with two groups of inner channels."""
SIDE = 32
"""Pixels of the square image with which channels are followed through the net."""


def _stages(model: Any) -> list[Any]:
    return list(model.base_model.encoder.stages)


def _layers(model: Any) -> list[nn.Module]:
    return [block for stage in _stages(model) for block in stage.layers]


def _set_layers(model: Any, keep: list[int]) -> None:
    kept, first, depths = set(keep), 0, []
    for stage in _stages(model):
        blocks = [block for i, block in enumerate(stage.layers, first) if i in kept]
        first += len(stage.layers)
        stage.layers = nn.Sequential(*blocks)
        depths.append(len(blocks))
    model.config.depths = depths


def _droppable(model: Any, index: int) -> bool:
    firsts = {id(stage.layers[0]) for stage in _stages(model)}
    layer: Any = _layers(model)[index]
    return isinstance(layer.shortcut, nn.Identity) and id(layer) not in firsts


def _slice_neurons(layer: Any, keep: torch.Tensor) -> None:
    convolutions = list(layer.layer)
    for i, block in enumerate(convolutions):
        last = i == len(convolutions) - 1
        block.convolution = convolution(block.convolution, out=None if last else keep, into=None if i == 0 else keep)
        if not last:
            block.normalization = batch_norm(block.normalization, keep)


@torch.no_grad()
def _align(layer: Any, keep: torch.Tensor) -> None:
    """Put the best channels between the first two convolutions of a bottleneck to the places `keep`.

    Those channels are others than those between the last two, which `keep` was chosen by. They are scored by the second
    moment that BatchNorm and ReLU leave, if what they norm is normal, times the weights that read them.
    """
    if len(layer.layer) != BOTTLENECK:
        return
    first, second = layer.layer[0], layer.layer[1]
    scale, shift = first.normalization.weight.abs().double(), first.normalization.bias.double()
    ratio = shift / scale.clamp_min(1e-12)
    density = (-(ratio**2) / 2).exp() / math.sqrt(2 * math.pi)
    power = (scale**2 + shift**2) * torch.special.ndtr(ratio) + scale * shift * density
    read = second.convolution.weight[keep].double().square().sum((0, 2, 3))
    ranked = (power * read).argsort(descending=True, stable=True)
    order, others = torch.empty_like(ranked), torch.ones(len(ranked), dtype=torch.bool)
    others[keep] = False
    order[keep], order[others] = ranked[: len(keep)], ranked[len(keep) :]
    first.convolution = convolution(first.convolution, out=order, into=None)
    first.normalization = batch_norm(first.normalization, order)
    second.convolution = convolution(second.convolution, out=None, into=order)


def _neurons(layer: Any) -> int:
    return int(layer.layer[0].convolution.out_channels)


def _neuron_input(layer: Any) -> nn.Module:
    module: nn.Module = layer.layer[-1].convolution
    return module


def _embeddings(model: Any) -> nn.Module:
    module: nn.Module = model.base_model.embedder
    return module


def _no_heads(layer: nn.Module, keep: torch.Tensor, head_dim: int) -> None:
    if len(keep):
        raise ValueError("a convolutional layer has no attention heads")


def _roots(model: Any) -> list[nn.Conv2d]:
    """The convolution that ends the embedder, and the one that ends each stage."""
    return [
        model.base_model.embedder.embedder.convolution,
        *(stage.layers[-1].layer[-1].convolution for stage in _stages(model)),
    ]


def _channels(model: Any) -> tuple[int, ...]:
    return tuple(root.out_channels for root in _roots(model))


def _members(model: Any, index: int) -> list[groups.Member]:
    pixels = torch.zeros(2, model.config.num_channels, SIDE, SIDE)
    return groups.members(model, _roots(model)[index], {"pixel_values": pixels})


def _slice_channels(model: Any, index: int, keep: torch.Tensor) -> None:
    groups.keep_channels(model, _members(model, index), keep)


def _channel_sources(model: Any, index: int) -> list[nn.Module]:
    return groups.sources(model, _members(model, index))


RESNET = Family(
    name="resnet",
    model_types=("resnet",),
    layers=_layers,
    set_layers=_set_layers,
    droppable=_droppable,
    heads=lambda layer: 0,
    neurons=_neurons,
    slice_heads=_no_heads,
    slice_neurons=_slice_neurons,
    align=_align,
    head_input=lambda layer: None,
    neuron_input=_neuron_input,
    qkv=None,
    embeddings=_embeddings,
    hidden=lambda model: _channels(model)[-1],
    channels=_channels,
    slice_channels=_slice_channels,
    channel_sources=_channel_sources,
    head_dim=lambda model: 0,
)
