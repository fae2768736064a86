"""Candidate shapes under a latency limit: which layers to keep, then how wide each may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from edgekd.arch import Arch, Layer
from edgekd.surgery import Importance

Predict = Callable[[Arch], float]
Score = Callable[[Arch], float]


def with_layers(arch: Arch, kept: Sequence[int]) -> Arch:
    """The same widths with only the layers at these positions."""
    return replace(arch, layers=tuple(arch.layers[i] for i in kept))


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


def uniform_widths(arch: Arch, kept: Sequence[int], limit: float, predict: Predict, steps: Steps) -> Arch | None:
    """The widest shape with the same share of heads and neurons in every kept layer that is under the limit."""
    base = with_layers(arch, kept)
    finest = max([layer.neurons // steps.neurons for layer in base.layers] + [layer.heads for layer in base.layers])
    for step in range(finest, 0, -1):
        shape = replace(base, layers=tuple(_share(layer, step / finest, steps) for layer in base.layers))
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
    losses = [_Losses.of(importance, i) for i in kept]
    latency = predict(shape)
    while latency > limit:
        best: tuple[float, Arch, float] | None = None
        for position, layer in enumerate(shape.layers):
            for smaller, loss in _smaller(layer, losses[position], steps):
                candidate = _replace_layer(shape, position, smaller)
                faster = predict(candidate)
                price = loss / max(latency - faster, 1e-9)
                if best is None or price < best[0]:
                    best = (price, candidate, faster)
        if best is None:
            return None
        _, shape, latency = best
    return shape


class Steps:
    """The sizes in which heads and neurons are cut."""

    def __init__(self, heads: int, neurons: int) -> None:
        self.heads, self.neurons = heads, neurons

    def fewer_heads(self, layer: Layer) -> int:
        """Heads after one step, at least one where there are any."""
        return max(layer.heads - self.heads, min(layer.heads, 1))

    def fewer_neurons(self, layer: Layer) -> int:
        """Neurons after one step, on a multiple of the step, at least one step."""
        multiple = (layer.neurons - 1) // self.neurons * self.neurons
        return max(multiple, min(self.neurons, layer.neurons))


class _Losses:
    """What is lost when only the best `n` heads or neurons of a layer stay: share of squared scores, cumulated."""

    def __init__(self, heads: torch.Tensor, neurons: torch.Tensor) -> None:
        self.heads, self.neurons = heads, neurons

    @classmethod
    def of(cls, importance: Importance, index: int) -> _Losses:
        return cls(_left_out(importance.heads[index]), _left_out(importance.neurons[index]))


def _left_out(scores: torch.Tensor) -> torch.Tensor:
    """`[n + 1]`: entry `k` is the share of squared scores that the best `k` do not hold."""
    squares = torch.sort(scores.double().square(), descending=True).values
    held = torch.cumsum(squares, 0) / squares.sum().clamp(min=1e-30)
    return torch.cat([torch.ones(1, dtype=held.dtype), 1 - held])


def _smaller(layer: Layer, losses: _Losses, steps: Steps) -> list[tuple[Layer, float]]:
    options = []
    heads, neurons = steps.fewer_heads(layer), steps.fewer_neurons(layer)
    if heads < layer.heads:
        options.append((replace(layer, heads=heads), float(losses.heads[heads] - losses.heads[layer.heads])))
    if neurons < layer.neurons:
        loss = float(losses.neurons[neurons] - losses.neurons[layer.neurons])
        options.append((replace(layer, neurons=neurons), loss))
    return options


def _share(layer: Layer, share: float, steps: Steps) -> Layer:
    heads = max(round(layer.heads * share / steps.heads) * steps.heads, min(layer.heads, 1))
    neurons = max(round(layer.neurons * share / steps.neurons) * steps.neurons, min(steps.neurons, layer.neurons))
    return replace(layer, heads=min(heads, layer.heads), neurons=min(neurons, layer.neurons))


def _replace_layer(arch: Arch, position: int, layer: Layer) -> Arch:
    return replace(arch, layers=(*arch.layers[:position], layer, *arch.layers[position + 1 :]))
