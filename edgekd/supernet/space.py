"""The shapes that a supernet trains: plain data, which search draws on too. Importing this does not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgekd.arch import Arch, Layer
from edgekd.errors import RecipeError

Pick = Callable[[int, int], int]
"""`(low, high)` to a whole number from low to high, both included."""
UNIT = 32
"""Widths of at least eight times as much are drawn in multiples of it, which processors like better."""


def evenly(layers: int, keep: int) -> tuple[int, ...]:
    """Which `keep` of `layers` layers a sub-network has: the i-th is layer i·layers/keep, counted from 1 and rounded.

    Halves are rounded down. The last layer, which the head reads, always stays; AutoDistil keeps floor(i·L/l) counted
    from 0 instead, which leaves it out: ADAPT.
    """
    return tuple((2 * i * layers + keep - 1) // (2 * keep) - 1 for i in range(1, keep + 1))


def kept_layers(droppable: Sequence[bool], keep: int) -> tuple[int, ...]:
    """Positions of `keep` layers: all that cannot be left out, and evenly spaced ones of the others.

    Raises:
        RecipeError: fewer than those that must stay, or more than there are.
    """
    spare = [position for position, free in enumerate(droppable) if free]
    fixed = len(droppable) - len(spare)
    if not max(fixed, 1) <= keep <= len(droppable):
        raise RecipeError(f"between {max(fixed, 1)} and {len(droppable)} layers can be kept, not {keep}")
    chosen = {spare[i] for i in evenly(len(spare), keep - fixed)} if keep > fixed else set()
    return tuple(position for position, free in enumerate(droppable) if not free or position in chosen)


@dataclass(frozen=True, kw_only=True)
class Space:
    """All sub-networks of `arch`: from `layers` layers up, and from these shares of heads and neurons up."""

    arch: Arch
    droppable: tuple[bool, ...]
    layers: int
    heads: float
    neurons: float

    @property
    def fewest(self) -> int:
        """The depth of the shallowest."""
        fixed = self.droppable.count(False)
        return min(max(self.layers, fixed, 1), len(self.droppable))

    def shape(self, pick: Pick) -> Arch:
        """The shape whose depth and widths (of each layer) are as picked from what is allowed."""
        depth = pick(self.fewest, len(self.droppable))
        layers = [self._layer(self.arch.layers[i], pick) for i in kept_layers(self.droppable, depth)]
        return replace(self.arch, layers=tuple(layers))

    def largest(self) -> Arch:
        """The whole."""
        return self.shape(lambda low, high: high)

    def smallest(self) -> Arch:
        """The fewest layers, each as narrow as allowed."""
        return self.shape(lambda low, high: low)

    def middle(self) -> Arch:
        """Half-way in depth and in all widths."""
        return self.shape(lambda low, high: (low + high) // 2)

    def _layer(self, layer: Layer, pick: Pick) -> Layer:
        heads = pick(math.ceil(self.heads * layer.heads), layer.heads) if layer.heads else 0
        unit = UNIT if layer.neurons >= 8 * UNIT and layer.neurons % UNIT == 0 else 1
        neurons = pick(math.ceil(self.neurons * layer.neurons / unit), layer.neurons // unit)
        return replace(layer, heads=heads, neurons=unit * neurons)
