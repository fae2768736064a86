"""Make a model physically smaller: keep the layers, heads, neurons and channels that an `Arch` asks for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgekd.arch import Arch
from edgekd.errors import ModelError
from edgekd.families import Family, arch_of, compact
from edgekd.student import Student
from edgekd.surgery.importance import Importance, top


def cut(student: Student, arch: Arch, importance: Importance) -> Student:
    """Slice a copy of the student down to `arch`; the kept parts are the most important ones, in their order.

    Args:
        student: the model to cut; it is not changed.
        arch: the shape wanted; `source` of its layers refers to the sources of the student's own layers. Its operators
            are installed too, its `vocabulary` is not looked at.
        importance: scores of the student's layers; `hidden` is needed for a narrower residual stream only. Stages of a
            convolutional net are narrowed by what is written to them (see `channel_scores`).

    Raises:
        ModelError: `arch` asks for a layer the student does not have, for more of anything than it has, or for widths
            that the family or `importance` cannot give.
    """
    position = {layer.source: i for i, layer in enumerate(student.arch.layers)}
    _check(student.arch, arch, position)
    _check_dropped(student, arch)
    _check_widths(student, arch, importance)
    model = copy.deepcopy(student.model)
    family = student.family
    kept = [position[layer.source] for layer in arch.layers]
    family.set_layers(model, kept)
    head_scores = _shared_scores([importance.heads[index] for index in kept], arch)
    for layer, index, shape, heads in zip(family.layers(model), kept, arch.layers, head_scores, strict=True):
        have = student.arch.layers[index]
        if shape.heads < have.heads:
            family.slice_heads(layer, top(heads, shape.heads), student.arch.head_dim)
        if shape.neurons < have.neurons:
            keep = top(importance.neurons[index], shape.neurons)
            if not student.ordered:
                family.align(layer, keep)
            family.slice_neurons(layer, keep)
    if arch.channels:
        _cut_channels(model, family, arch.channels)
    elif arch.hidden < student.arch.hidden and family.slice_hidden is not None and importance.hidden is not None:
        family.slice_hidden(model, top(importance.hidden, arch.hidden))
    compact.install(model, family, arch.layers)
    sources = tuple(layer.source for layer in arch.layers)
    return replace(student, model=model, arch=arch_of(model, sources), plan=None)


def channel_scores(sources: Sequence[Any]) -> torch.Tensor:
    """How much is written to each channel `[C]`, over the modules `sources` of one stage.

    A BatchNorm undoes the size of the weights before it, so its own scale and shift count, `sqrt(γ² + β²)`; the L2 norm
    of its weights for a convolution that none follows.
    """
    squares = [_written(module) for module in sources]
    return torch.stack(squares).sum(dim=0).sqrt()


def _written(module: nn.Conv2d | nn.BatchNorm2d) -> torch.Tensor:
    weight = module.weight.detach().float()
    if isinstance(module, nn.BatchNorm2d):
        return weight.square() + module.bias.detach().float().square()
    return weight.flatten(1).square().sum(dim=1)


def _shared_scores(scores: list[torch.Tensor], arch: Arch) -> list[torch.Tensor]:
    """Scores of heads per layer; layers that share attention get their sum, so that the same heads stay in all."""
    shared = list(scores)
    first = 0
    for index, layer in enumerate(arch.layers):
        if not layer.shares or len(scores[index]) != len(scores[first]):
            first = index
        run = slice(first, index + 1)
        shared[run] = [torch.stack(scores[run]).sum(dim=0)] * (index + 1 - first)
    return shared


def _cut_channels(model: Any, family: Family, want: tuple[int, ...]) -> None:
    for index, width in enumerate(want):
        have = family.channels(model)[index]
        if width < have and family.slice_channels is not None:
            keep = top(channel_scores(family.channel_sources(model, index)), width)
            family.slice_channels(model, index, keep)
    if (got := family.channels(model)) != want:
        raise ModelError(
            f"the plan asks for channels {_joined(want)}, but {_joined(got)} is what comes of it: the embedder and the "
            "first stage share theirs; give both the same width"
        )


def _check(have: Arch, want: Arch, position: dict[int, int]) -> None:
    for layer in want.layers:
        if layer.source not in position:
            raise ModelError(f"the plan keeps layer {layer.source}, but the model has layers {sorted(position)}")
        own = have.layers[position[layer.source]]
        if (
            layer.heads > own.heads
            or layer.neurons > own.neurons
            or layer.neurons < 1
            or (own.heads and not layer.heads)
        ):
            raise ModelError(
                f"layer {layer.source} has {own.heads} heads and {own.neurons} neurons; "
                f"the plan asks for {layer.heads} and {layer.neurons}"
            )
    sources = [layer.source for layer in want.layers]
    if sources != sorted(set(sources)) or not sources:
        raise ModelError(f"the plan must keep at least one layer, each once and in order, not {sources}")


def _check_dropped(student: Student, want: Arch) -> None:
    kept = {layer.source for layer in want.layers}
    for index, layer in enumerate(student.arch.layers):
        if layer.source not in kept and not student.family.droppable(student.model, index):
            raise ModelError(
                f"layer {layer.source} changes the size of what it passes on and cannot be left out: keep it"
            )


def _check_widths(student: Student, want: Arch, importance: Importance) -> None:
    have, family = student.arch, student.family
    if not 1 <= want.hidden <= have.hidden:
        raise ModelError(f"the model has a hidden size of {have.hidden}; the plan asks for {want.hidden}")
    if have.channels:
        wanted = want.channels or have.channels
        fits = len(wanted) == len(have.channels) and all(
            1 <= x <= own for x, own in zip(wanted, have.channels, strict=True)
        )
        if not fits:
            raise ModelError(f"the model has channels {_joined(have.channels)}; the plan asks for {_joined(wanted)}")
        if want.hidden != wanted[-1]:
            raise ModelError(
                f"the plan asks for a hidden size of {want.hidden}, but for {wanted[-1]} channels in the last stage; "
                "these are the same thing"
            )
    elif want.channels:
        raise ModelError(f"models of the family {family.name} have no stages; leave the plan's channels empty")
    elif want.hidden < have.hidden and (importance.hidden is None or family.slice_hidden is None):
        raise ModelError(
            f"the plan narrows the hidden size from {have.hidden} to {want.hidden}, but nothing says which channels "
            "matter; measure importance with scores of the hidden channels, or keep the hidden size"
        )


def _joined(widths: Sequence[int]) -> str:
    return "/".join(map(str, widths))
