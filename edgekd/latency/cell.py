"""What the parts of one architecture family cost at one hidden size, precision, batch and sequence length.

    latency = ( base + Σ over layers [ fixed + attention(heads) + inner(neurons) ] ) · correction

`attention` and `inner` are monotone and piecewise linear, so nothing gets cheaper by growing. All parts are fitted to
whole measured models: chains of equal layers of different lengths give the marginal cost of a layer. Where the last
layer computes for one token alone, it takes a share of these costs only. Where layers of
different depth differ in cost (convolutional stages), the fixed and inner parts are fitted per source layer. The
correction is fitted to what is left over on models with mixed layers (see `edgekd.latency.correction`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.arch import Arch, Layer
from edgekd.errors import ModelError

Floats = npt.NDArray[np.float64]
ANY_SOURCE = -1
Shares = tuple[float, float, float]
WHOLE: Shares = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a cell holds for. `outline` tells convolutional nets apart; `sequence` is None where there is none."""

    family: str
    hidden: int
    head_dim: int
    lowering: str
    batch: int = 1
    sequence: int | None = None
    outline: str = ""

    def describe(self) -> str:
        """One line for messages: `bert 384 (heads of 32), int8_dynamic, batch 1, 64 tokens`."""
        heads = f" (heads of {self.head_dim})" if self.head_dim else f" ({self.outline})"
        tokens = f", {self.sequence} tokens" if self.sequence else ""
        return f"{self.family} {self.hidden}{heads}, {self.lowering}, batch {self.batch}{tokens}"


@dataclass(frozen=True)
class Curve:
    """A monotone piecewise-linear cost in milliseconds over `knots` (the first is 0, where it costs nothing)."""

    knots: tuple[float, ...] = (0.0,)
    ms: tuple[float, ...] = (0.0,)

    def at(self, x: npt.ArrayLike) -> Floats:
        """Costs at `x`, of its shape; beyond the last knot the last slope goes on."""
        points = np.asarray(x, dtype=np.float64)
        cost = np.interp(points, self.knots, self.ms)
        if len(self.knots) > 1:
            slope = (self.ms[-1] - self.ms[-2]) / (self.knots[-1] - self.knots[-2])
            cost = cost + slope * np.clip(points - self.knots[-1], 0.0, None)
        return np.asarray(cost, dtype=np.float64)


@dataclass(frozen=True)
class Shapes:
    """Architectures as arrays [P, L], padded with zeros: `heads`, `neurons`, `source`, `there` (real ones), `last`."""

    heads: Floats
    neurons: Floats
    source: npt.NDArray[np.int64]
    there: npt.NDArray[np.bool_]
    last: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, archs: Sequence[Arch]) -> Shapes:
        """Pack architectures of one family."""
        size = (len(archs), max((len(arch.layers) for arch in archs), default=0))
        heads, neurons = np.zeros(size), np.zeros(size)
        source, there = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.bool_)
        last = np.zeros(size, dtype=np.bool_)
        for row, arch in enumerate(archs):
            for column, layer in enumerate(arch.layers):
                heads[row, column], neurons[row, column] = layer.heads, layer.neurons
                source[row, column], there[row, column] = layer.source, True
            last[row, len(arch.layers) - 1] = True
        return cls(heads, neurons, source, there, last)


@dataclass(frozen=True)
class Parts:
    """Uncorrected costs of a population in milliseconds, [P] each, and the depth [P]."""

    base: Floats
    fixed: Floats
    heads: Floats
    neurons: Floats
    depth: Floats

    @property
    def total(self) -> Floats:
        """Their sum [P]."""
        return self.base + self.fixed + self.heads + self.neurons

    def features(self) -> Floats:
        """What the correction looks at [P, 4]: the shares of base, heads and neurons, and the depth's logarithm."""
        total = self.total
        return np.stack(
            [self.base / total, self.heads / total, self.neurons / total, np.log(np.maximum(self.depth, 1.0))], axis=1
        )


@dataclass(frozen=True)
class Correction:
    """A factor `exp(weights · (features - centre))` close to 1; without weights it is 1.

    `low` and `high` [F] bound the features it was fitted on: beyond them it stays what it is at the bound.
    """

    weights: tuple[float, ...] = ()
    bias: float = 0.0
    centre: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def factor(self, features: Floats) -> Floats:
        """Factors [P] for features [P, F]."""
        if not self.weights:
            return np.full(len(features), np.exp(self.bias))
        bounded = np.clip(features, self.low, self.high)
        return np.asarray(np.exp(self.bias + (bounded - np.asarray(self.centre)) @ np.asarray(self.weights)))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Costs in milliseconds. `layer_ms` and `neurons` are keyed by source layer, or by -1 for all layers alike.

    `error` holds relative errors of points that took no part in the fit of what predicts them: `median`, `p90`,
    `max`, and `n`. `deepest` is the largest depth seen. `last` are the shares of a layer's fixed, attention and inner
    cost that the last one takes.
    """

    frame: Frame
    base_ms: float
    layer_ms: Mapping[int, float]
    heads: Curve
    neurons: Mapping[int, Curve]
    deepest: int = 0
    correction: Correction = field(default_factory=Correction)
    error: Mapping[str, float] = field(default_factory=dict)
    last: Shares = WHOLE

    def parts(self, shapes: Shapes) -> Parts:
        """Uncorrected costs of a population.

        Raises:
            ModelError: a layer of a source that was never measured.
        """
        fixed, heads, inner = self._costs(shapes)
        count = len(shapes.heads)
        return Parts(
            np.full(count, self.base_ms), fixed.sum(1), heads.sum(1), inner.sum(1), shapes.there.sum(1).astype(float)
        )

    def layer_costs(self, arch: Arch) -> Floats:
        """Uncorrected fixed, attention and inner cost of each layer [L, 3] in milliseconds.

        Raises:
            ModelError: a layer of a source that was never measured.
        """
        return np.asarray(np.stack(self._costs(Shapes.of([arch])), axis=-1)[0])

    def _costs(self, shapes: Shapes) -> tuple[Floats, Floats, Floats]:
        fixed, inner = np.zeros(shapes.heads.shape), np.zeros(shapes.heads.shape)
        known = np.zeros(shapes.heads.shape, dtype=np.bool_)
        for key, curve in self.neurons.items():
            here = shapes.there & ((shapes.source == key) | (key == ANY_SOURCE))
            known |= here
            fixed = np.where(here, self.layer_ms[key], fixed)
            inner = np.where(here, curve.at(shapes.neurons), inner)
        if not known[shapes.there].all():
            strange = sorted(set(shapes.source[shapes.there & ~known].tolist()))
            raise ModelError(f"the latency table knows no layer made from the teacher's layers {strange}")
        heads = np.where(shapes.there, self.heads.at(shapes.heads), 0.0)
        fixed, heads, inner = (
            np.where(shapes.last, share * cost, cost)
            for share, cost in zip(self.last, (fixed, heads, inner), strict=True)
        )
        return fixed, heads, inner

    def predict(self, shapes: Shapes) -> Floats:
        """Median latencies [P] in milliseconds."""
        parts = self.parts(shapes)
        return np.asarray(parts.total * self.correction.factor(parts.features()))

    def beyond(self, arch: Arch) -> tuple[str, ...]:
        """Which dimensions of the architecture lie outside what was measured."""
        found = []
        if len(arch.layers) > self.deepest:
            found.append(f"{len(arch.layers)} layers (at most {self.deepest} were measured)")
        if (most := max(layer.heads for layer in arch.layers)) > self.heads.knots[-1]:
            found.append(f"{most} heads (at most {self.heads.knots[-1]:g})")
        for layer in arch.layers:
            limit = self._knots(layer)
            if layer.neurons > limit:
                found.append(f"{layer.neurons} neurons (at most {limit:g})")
                break
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("layer_ms", "neurons")},
            "layer_ms": {str(key): ms for key, ms in self.layer_ms.items()},
            "neurons": {str(key): asdict(curve) for key, curve in self.neurons.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        """Read what `to_dict` wrote; raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        return cls(
            **{
                **data,
                "frame": Frame(**data["frame"]),
                "layer_ms": {int(key): float(ms) for key, ms in data["layer_ms"].items()},
                "heads": _curve(data["heads"]),
                "neurons": {int(key): _curve(curve) for key, curve in data["neurons"].items()},
                "correction": _correction(data["correction"]),
                "last": _shares(data.get("last", WHOLE)),
            }
        )

    @cached_property
    def _limits(self) -> dict[int, float]:
        return {key: curve.knots[-1] for key, curve in self.neurons.items()}

    def _knots(self, layer: Layer) -> float:
        return self._limits.get(layer.source, self._limits.get(ANY_SOURCE, 0.0))


def _correction(data: Mapping[str, Any]) -> Correction:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Correction(**values)


def _shares(data: Sequence[float]) -> Shares:
    fixed, heads, inner = map(float, data)
    return fixed, heads, inner


def _curve(data: Mapping[str, Any]) -> Curve:
    knots, ms = tuple(map(float, data["knots"])), tuple(map(float, data["ms"]))
    if len(knots) != len(ms) or sorted(set(knots)) != list(knots) or not knots:
        raise ValueError("a curve's knots must rise and each have a cost")
    return Curve(knots, ms)
