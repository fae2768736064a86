"""The steps in which widths are worth cutting on a device, read from its latency table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgekd.arch import Arch
from edgekd.latency.cell import Cell, Curve
from edgekd.search.space import Steps

RISE = 0.25
"""A width costs more than the one below if the difference is this share of what a straight line would have."""
ENOUGH = 0.8
"""Share of the multiples of a step that must cost more than the one below."""
FINEST_NEURONS, COARSEST_NEURONS = 32, 256
FINEST_SHARE = 16
"""Widths are cut at least into so many parts where they are too narrow for steps of 32."""


def choose_steps(cells: Sequence[Cell], arch: Arch, heads: int | None, neurons: int | None) -> Steps:
    """The steps given, or the smallest at which latency rises with (nearly) every multiple.

    Between two multiples of such a step the device computes as long as at the upper one, so that nothing is gained by
    going below it. Steps of neurons begin at 32, or a sixteenth of a narrower layer. ADAPT.
    """
    narrowest = min(layer.neurons for layer in arch.layers)
    widest = max(layer.neurons for layer in arch.layers)
    most_heads = max(layer.heads for layer in arch.layers)
    if neurons is None:
        finest = min(FINEST_NEURONS, _power_below(narrowest // FINEST_SHARE))
        coarsest = max(min(COARSEST_NEURONS, narrowest // 2), finest)
        curves = [curve for cell in cells for curve in cell.neurons.values()]
        neurons = _smallest(curves, list(_doubled(finest, coarsest)), widest)
    if heads is None:
        heads = _smallest([cell.heads for cell in cells], list(_doubled(1, max(most_heads // 2, 1))), most_heads)
    return Steps(heads, neurons)


def rises(curve: Curve, step: int, full: int) -> float:
    """Share of the multiples of a step, up to `full`, that cost more than the multiple below; 0 for a flat curve."""
    counts = range(step, full + 1, step)
    if not counts:
        return 0.0
    cost = curve.at([0, *counts])
    slope = float(cost[-1] - cost[0]) / len(counts)
    if slope <= 0:
        return 0.0
    return float(((cost[1:] - cost[:-1]) >= RISE * slope).mean())


def _smallest(curves: Sequence[Curve], options: Sequence[int], full: int) -> int:
    known = [curve for curve in curves if curve.ms[-1] > curve.ms[0]]
    if not known:
        return options[0]
    shares = [min(rises(curve, step, min(full, int(curve.knots[-1]))) for curve in known) for step in options]
    good = [step for step, share in zip(options, shares, strict=True) if share >= ENOUGH]
    return good[0] if good else options[shares.index(max(shares))]


def _doubled(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _power_below(value: int) -> int:
    return 1 << max(value.bit_length() - 1, 0)
