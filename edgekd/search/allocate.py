"""Widths and depth for a latency limit: the least summed error of the layers, by dynamic programming.

As ZipLM allocates (Kurtić, Frantar & Alistarh 2023, arXiv 2302.04089): a table of latencies that adds up over layers, a
table of errors, and the optimum over both. ADAPT: errors are weighted by what the layer's output makes of them, and
instead of bins of time all combinations that no other beats in both are kept (Nemhauser & Ullmann 1969).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgekd.arch import Arch, Layer
from edgekd.search.space import Predict, Steps
from edgekd.surgery.curves import Curves

Floats = npt.NDArray[np.float64]
FRONT = 2000
"""At most so many combinations are kept after each layer, evenly spread over time; below that nothing is lost."""
SLACK = 1.5
"""Combinations up to so many times the limit are kept, because costs do not quite add up."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds that add up: `base`, and for each layer `fixed[l]`, `heads[l][h]` and `neurons[l][n]`."""

    base: float
    fixed: Sequence[float]
    heads: Sequence[Mapping[int, float]]
    neurons: Sequence[Mapping[int, float]]


@dataclass(frozen=True)
class _Options:
    """What may become of one layer: its shape (None: left out), time and error."""

    layers: list[Layer | None]
    ms: Floats
    errors: Floats


@dataclass(frozen=True)
class _Front:
    """Combinations that no other beats in both; `previous` and `option` tell how each came about."""

    ms: Floats
    errors: Floats
    previous: npt.NDArray[np.int64]
    option: npt.NDArray[np.int64]


def allocate(
    arch: Arch,
    curves: Curves,
    predict: Predict,
    limit: float,
    steps: Steps,
    kept: Sequence[int] | None = None,
    costs: Costs | None = None,
) -> Arch | None:
    """The shape with the least error whose predicted latency is within the limit, or None if there is none.

    The error is the sum over layers of `curves.error`, or of `curves.drops` for layers left out. It is the optimum
    where latencies add up; where they do not, the best of what is optimal for some limit of the sum is taken.

    Args:
        arch: the full shape, whose layers are those of `curves`.
        curves: errors of its layers.
        predict: milliseconds of a shape.
        limit: milliseconds.
        steps: widths are multiples of these, or the full ones.
        kept: positions of the layers to keep; None: that is chosen too.
        costs: latencies that add up; None: found by asking `predict` for shapes that differ in one layer.
    """
    costs = costs or additive(arch, predict, steps)
    chosen = range(len(arch.layers)) if kept is None else kept
    options = [_options(arch, i, curves, costs, steps, droppable=kept is None) for i in chosen]
    fronts = _combine(options, costs.base, limit * SLACK)
    last = fronts[-1]
    for index in np.argsort(last.errors, kind="stable"):
        shape = replace(arch, layers=_trace(fronts, options, int(index)))
        if predict(shape) <= limit:
            return shape
    return None


def additive(arch: Arch, predict: Predict, steps: Steps) -> Costs:
    """Costs from differences between the full shape and shapes that differ in one layer.

    `fixed` is what the whole layer costs, so that `heads` and `neurons` hold savings, which are negative.
    """
    whole, fixed, of_heads, of_neurons = predict(arch), [], [], []
    for i, layer in enumerate(arch.layers):
        heads = {h: predict(_with(arch, i, replace(layer, heads=h))) - whole for h in head_counts(layer, steps)}
        neurons = {n: predict(_with(arch, i, replace(layer, neurons=n))) - whole for n in neuron_counts(layer, steps)}
        of_heads.append(heads)
        of_neurons.append(neurons)
        fixed.append(whole - predict(_with(arch, i, None)) if len(arch.layers) > 1 else 0.0)
    return Costs(whole - sum(fixed), fixed, of_heads, of_neurons)


def head_counts(layer: Layer, steps: Steps) -> list[int]:
    """The numbers of heads that a layer may have."""
    if not layer.heads:
        return [0]
    return sorted({*range(steps.heads, layer.heads, steps.heads), layer.heads})


def neuron_counts(layer: Layer, steps: Steps) -> list[int]:
    """The numbers of neurons that a layer may have."""
    return sorted({*range(steps.neurons, layer.neurons, steps.neurons), layer.neurons})


def _with(arch: Arch, position: int, layer: Layer | None) -> Arch:
    changed = () if layer is None else (layer,)
    return replace(arch, layers=(*arch.layers[:position], *changed, *arch.layers[position + 1 :]))


def _options(arch: Arch, index: int, curves: Curves, costs: Costs, steps: Steps, *, droppable: bool) -> _Options:
    """The choices for one layer that no other choice beats in both time and error."""
    layer, layers = arch.layers[index], list[Layer | None]()
    ms, errors = [], []
    for heads in head_counts(layer, steps):
        for neurons in neuron_counts(layer, steps):
            layers.append(replace(layer, heads=heads, neurons=neurons))
            ms.append(costs.fixed[index] + costs.heads[index][heads] + costs.neurons[index][neurons])
            errors.append(curves.error(index, heads, neurons))
    best = _undominated(np.asarray(ms), np.asarray(errors))
    found = [layers[i] for i in best]
    ms, errors = [ms[i] for i in best], [errors[i] for i in best]
    if droppable and np.isfinite(curves.drops[index]):
        found, ms, errors = [*found, None], [*ms, 0.0], [*errors, curves.drops[index]]
    return _Options(found, np.asarray(ms), np.asarray(errors))


def _combine(options: Sequence[_Options], base: float, most: float) -> list[_Front]:
    """The front after each layer. Row 0 of each is the combination that leaves out everything so far, if it may."""
    front = _Front(np.array([base]), np.array([0.0]), np.array([-1]), np.array([-1]))
    nothing, fronts = True, []
    for layer in options:
        ms = (front.ms[:, None] + layer.ms[None, :]).ravel()
        errors = (front.errors[:, None] + layer.errors[None, :]).ravel()
        previous = np.repeat(np.arange(len(front.ms)), len(layer.ms))
        option = np.tile(np.arange(len(layer.ms)), len(front.ms))
        dropped = np.flatnonzero([shape is None for shape in layer.layers])
        empty = np.flatnonzero((previous == 0) & np.isin(option, dropped)) if nothing else np.array([], np.int64)
        within = np.setdiff1d(np.flatnonzero(ms <= most), empty)
        best = within[_thin(ms[within], errors[within])]
        nothing = len(empty) > 0
        rows = np.concatenate([empty, best]).astype(np.int64)
        front = _Front(ms[rows], errors[rows], previous[rows], option[rows])
        fronts.append(front)
    if nothing:  # a model without layers is none
        fronts[-1] = _Front(front.ms[1:], front.errors[1:], front.previous[1:], front.option[1:])
    return fronts


def _undominated(ms: Floats, errors: Floats) -> npt.NDArray[np.int64]:
    """Indices of what nothing else beats, fastest first."""
    order = np.lexsort((errors, ms))
    lowest = np.minimum.accumulate(errors[order]) if len(order) else errors
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = lowest[1:] < lowest[:-1]
    return np.asarray(order[first], dtype=np.int64)


def _thin(ms: Floats, errors: Floats) -> npt.NDArray[np.int64]:
    """The undominated ones, and of those the best of each of `FRONT` bins of time where there are more."""
    best = _undominated(ms, errors)
    if len(best) <= FRONT:
        return best
    low, high = ms[best[0]], ms[best[-1]]
    bins = np.minimum((FRONT * (ms[best] - low) / (high - low)).astype(np.int64), FRONT - 1)
    keep = np.append(bins[1:] != bins[:-1], True)  # errors fall with time, so the last of a bin is its best
    keep[0] = True
    return np.asarray(best[keep], dtype=np.int64)


def _trace(fronts: Sequence[_Front], options: Sequence[_Options], index: int) -> tuple[Layer, ...]:
    """The layers of one combination."""
    found: list[Layer] = []
    for front, layer in zip(reversed(fronts), reversed(options), strict=True):
        shape = layer.layers[int(front.option[index])]
        if shape is not None:
            found.append(shape)
        index = int(front.previous[index])
    return tuple(reversed(found))
