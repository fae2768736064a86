"""Shapes under a latency limit, found cheaply: which layers to keep, then how wide each may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from edgekd.arch import Arch, Layer
from edgekd.search.space import Predict, Score, Space, Steps, replace_layer, with_layers
from edgekd.surgery import Importance


def depth_chain(arch: Arch, droppable: Sequence[bool], score: Score, *, fewest: int) -> list[tuple[int, ...]]:
    """Positions of kept layers for every depth, deepest first: each step drops the layer that hurts least.

    `score` is called on O(layers²) shapes.
    """
    kept = tuple(range(len(arch.layers)))
    chain = [kept]
    while len(kept) > fewest:
        options = [tuple(k for k in kept if k != i) for i in kept if droppable[i]]
        if not options:
            break
        kept = min(options, key=lambda option: score(with_layers(arch, option)))
        chain.append(kept)
    return chain


def uniform_widths(
    arch: Arch, kept: Sequence[int], limit: float, predict: Predict, steps: Steps, *, whole_last: bool = False
) -> Arch | None:
    """The widest shape with the same share of heads and neurons in every kept layer that is under the limit.

    With `whole_last` the last layer keeps all it has: where it computes for one token alone, that costs little.
    """
    base = with_layers(arch, kept)
    finest = max([layer.neurons // steps.neurons for layer in base.layers] + [layer.heads for layer in base.layers])
    for step in range(finest, 0, -1):
        layers = [_share(layer, step / finest, steps) for layer in base.layers]
        shape = replace(base, layers=(*layers[:-1], base.layers[-1] if whole_last else layers[-1]))
        if predict(shape) <= limit:
            return shape
    return None


def importance_widths(
    arch: Arch, kept: Sequence[int], limit: float, predict: Predict, steps: Steps, importance: Importance
) -> Arch | None:
    """Cut the least important heads and neurons per millisecond saved until the prediction is under the limit.

    A part's importance is its share of its layer's squared scores, so that layers of different scale compare.
    """
    shape = with_layers(arch, kept)
    losses = [Losses.of(importance, i) for i in kept]
    latency = predict(shape)
    while latency > limit:
        best: tuple[float, Arch, float] | None = None
        for position, layer in enumerate(shape.layers):
            for smaller, loss in _smaller(layer, losses[position], steps):
                candidate = replace_layer(shape, position, smaller)
                faster = predict(candidate)
                price = loss / max(latency - faster, 1e-9)
                if best is None or price < best[0]:
                    best = (price, candidate, faster)
        if best is None:
            return None
        _, shape, latency = best
    return shape


def stepped(arch: Arch, limit: float, predict: Predict, space: Space, importance: Importance) -> Arch | None:
    """A shape near another one: a step at a time narrower until it is under the limit, then wider while that fits.

    Each step takes what matters least, or adds what matters most, for the time it saves or costs.
    """
    position = {layer.source: i for i, layer in enumerate(space.arch.layers)}
    losses = {source: Losses.of(importance, i) for source, i in position.items()}

    def lost(shape: Arch) -> float:
        return sum(losses[layer.source].total(layer) for layer in shape.layers)

    latency = predict(arch)
    while latency > limit:
        options = [(option, predict(option)) for option, way in space.steps_of(arch) if way < 0]
        if not options:
            return None
        now, was = lost(arch), latency
        arch, latency = min(options, key=lambda pair: (lost(pair[0]) - now) / max(was - pair[1], 1e-9))
    while True:
        options = [(option, predict(option)) for option, way in space.steps_of(arch) if way > 0]
        options = [(option, ms) for option, ms in options if ms <= limit]
        if not options:
            return arch
        now, was = lost(arch), latency
        arch, latency = max(options, key=lambda pair: (now - lost(pair[0])) / max(pair[1] - was, 1e-9))


class Losses:
    """What is lost when only the best `n` heads or neurons of a layer stay: share of squared scores, cumulated."""

    def __init__(self, heads: torch.Tensor, neurons: torch.Tensor) -> None:
        self.heads, self.neurons = heads, neurons

    @classmethod
    def of(cls, importance: Importance, index: int) -> Losses:
        """The losses of one layer of the model that importance was measured on."""
        return cls(_left_out(importance.heads[index]), _left_out(importance.neurons[index]))

    def total(self, layer: Layer) -> float:
        """What a layer of these widths has lost of its heads and neurons."""
        heads = float(self.heads[layer.heads]) if layer.heads else 0.0
        return heads + float(self.neurons[layer.neurons])


def _left_out(scores: torch.Tensor) -> torch.Tensor:
    """`[n + 1]`: entry `k` is the share of squared scores that the best `k` do not hold."""
    squares = torch.sort(scores.double().square(), descending=True).values
    held = torch.cumsum(squares, 0) / squares.sum().clamp(min=1e-30)
    return torch.cat([torch.ones(1, dtype=held.dtype), 1 - held])


def _smaller(layer: Layer, losses: Losses, steps: Steps) -> list[tuple[Layer, float]]:
    options = []
    heads, neurons = steps.fewer_heads(layer), steps.fewer_neurons(layer)
    if heads < layer.heads:
        options.append((replace(layer, heads=heads), float(losses.heads[heads] - losses.heads[layer.heads])))
    if neurons < layer.neurons:
        loss = float(losses.neurons[neurons] - losses.neurons[layer.neurons])
        options.append((replace(layer, neurons=neurons), loss))
    return options


def _share(layer: Layer, share: float, steps: Steps) -> Layer:
    heads = max(round(layer.heads * share / steps.heads) * steps.heads, steps.least_heads(layer))
    neurons = max(round(layer.neurons * share / steps.neurons) * steps.neurons, steps.least_neurons(layer))
    return replace(layer, heads=min(heads, layer.heads), neurons=min(neurons, layer.neurons))
