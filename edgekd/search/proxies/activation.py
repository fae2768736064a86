"""Share of importance that is cut away; nothing is run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgekd.arch import Arch, Layer
from edgekd.search.proxies.context import ProxyContext
from edgekd.surgery import Importance


def activation(context: ProxyContext) -> Callable[[Arch], float]:
    """1 minus the share of squared importance that a shape keeps, in [0, 1].

    A kept layer holds the mean of its heads' and its neurons' shares, a dropped one nothing, and layers weigh by
    their own squared scores. A narrower residual stream multiplies that by `held_stream`. Scores are those of Minitron
    (Muralidharan et al. 2024, arXiv 2407.14679); adding them up over a shape is ours (ADAPT). What else a layer may
    change (`tokens`, `rank`, …) is not seen.
    """
    importance = context.importance
    weights = importance.layers.double().square()
    if not bool(weights.sum() > 0):
        weights = torch.ones_like(weights)
    weights = weights / weights.sum()

    def score(arch: Arch) -> float:
        held = sum(float(weights[i]) * _held_by_layer(importance, i, layer) for i, layer in context.positions(arch))
        return 1.0 - held * held_stream(context, arch)

    return score


def held_stream(context: ProxyContext, arch: Arch) -> float:
    """Share of the residual stream that a shape keeps: by importance, or by number where channels have no scores."""
    have, scores = context.student.arch, context.importance.hidden
    if arch.channels:
        return sum(kept / own for kept, own in zip(arch.channels, have.channels, strict=True)) / len(arch.channels)
    return arch.hidden / have.hidden if scores is None else held_share(scores, arch.hidden)


def held_share(scores: torch.Tensor, count: int) -> float:
    """Share of the sum of squares `[N]` that the `count` largest hold; 1 where all are zero."""
    squares = torch.sort(scores.double().square(), descending=True).values
    total = float(squares.sum())
    return float(squares[:count].sum()) / total if total > 0 else 1.0


def _held_by_layer(importance: Importance, index: int, layer: Layer) -> float:
    neurons = held_share(importance.neurons[index], layer.neurons)
    if not len(importance.heads[index]):
        return neurons
    return (held_share(importance.heads[index], layer.heads) + neurons) / 2
