"""A latency table: what the parts of one architecture family cost on one target, fitted to whole measured models.

    latency = base + Σ over layers [ fixed + attention(heads) + inner(neurons) ]

`attention` and `inner` are monotone and piecewise linear; so nothing gets cheaper by growing. Where layers of
different depth differ in cost (convolutional stages), the fixed and inner parts are fitted per source layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.arch import Arch, Layer
from edgekd.errors import ModelError

Floats = npt.NDArray[np.float64]
Points = Sequence[tuple[Arch, float]]

MAX_KNOTS = 8
ANY_SOURCE = -1
# Weight of "neighbouring slopes are alike" against the measurements: it only decides where these say nothing.
SMOOTHNESS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What was measured and where; a table holds for these only."""

    target: str
    batch: int
    sequence: int | None
    threads: int
    precision: str
    cpu: str = ""
    runtime: str = ""
    date: str = ""


@dataclass(frozen=True)
class Curve:
    """A monotone piecewise-linear cost in milliseconds over `knots` (the first is 0, where it costs nothing)."""

    knots: tuple[float, ...] = (0.0,)
    ms: tuple[float, ...] = (0.0,)

    def at(self, x: float) -> float:
        """Cost at `x`; beyond the last knot the last slope goes on."""
        last = self.knots[-1]
        if x <= last or len(self.knots) < 2:
            return float(np.interp(x, self.knots, self.ms))
        slope = (self.ms[-1] - self.ms[-2]) / (last - self.knots[-2])
        return self.ms[-1] + slope * (x - last)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Costs in milliseconds. `layer_ms` and `neurons` are keyed by source layer, or by -1 for all layers alike.

    `error` holds the relative errors of each point predicted from all the others: `median`, `p90`, `max`, and `n`.
    """

    conditions: Conditions
    family: str
    hidden: int
    base_ms: float
    layer_ms: Mapping[int, float]
    heads: Curve
    neurons: Mapping[int, Curve]
    error: Mapping[str, float] = field(default_factory=dict)

    def predict(self, arch: Arch) -> float:
        """Latency of an architecture in milliseconds.

        Raises:
            ModelError: it is of another family or hidden size, or has a layer the table knows nothing of.
        """
        if (arch.family, arch.hidden) != (self.family, self.hidden):
            raise ModelError(
                f"the latency table is of {self.family} with hidden size {self.hidden}, not of {arch.family} with "
                f"{arch.hidden}: measure that first"
            )
        return self.base_ms + sum(self._layer(layer) for layer in arch.layers)

    def extrapolates(self, arch: Arch) -> bool:
        """Whether a layer is wider than anything measured."""
        return any(
            layer.heads > self.heads.knots[-1] or layer.neurons > self.neurons[self._key(layer)].knots[-1]
            for layer in arch.layers
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            **asdict(self),
            "layer_ms": {str(key): ms for key, ms in self.layer_ms.items()},
            "neurons": {str(key): asdict(curve) for key, curve in self.neurons.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Read what `to_dict` wrote.

        Raises:
            ModelError: a field is missing, unknown or of the wrong kind.
        """
        try:
            return cls(
                **{
                    **data,
                    "conditions": Conditions(**data["conditions"]),
                    "layer_ms": {int(key): float(ms) for key, ms in data["layer_ms"].items()},
                    "heads": _curve(data["heads"]),
                    "neurons": {int(key): _curve(curve) for key, curve in data["neurons"].items()},
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"the latency table is damaged: {error}; measure it again") from None

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def _key(self, layer: Layer) -> int:
        key = layer.source if ANY_SOURCE not in self.neurons else ANY_SOURCE
        if key not in self.neurons:
            raise ModelError(f"the latency table knows no layer made from the teacher's layer {key}")
        return key

    def _layer(self, layer: Layer) -> float:
        key = self._key(layer)
        return self.layer_ms[key] + self.heads.at(layer.heads) + self.neurons[key].at(layer.neurons)


def load(path: Path) -> LatencyTable:
    """Read a table from a JSON file.

    Raises:
        ModelError: it cannot be read or is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the latency table {path}: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"the latency table {path} is damaged: expected an object")
    return LatencyTable.from_dict(data)


def fit(points: Points, *, conditions: Conditions, by_source: bool = False) -> LatencyTable:
    """Fit a table to measured (architecture, milliseconds) pairs by nonnegative least squares on relative errors.

    `by_source` fits fixed and inner costs for each source layer by itself: for convolutional stages. The error is
    found by leaving out one point at a time.

    Raises:
        ModelError: fewer than three points, points of several families or hidden sizes, or a latency not over 0.
    """
    shapes = {(arch.family, arch.hidden) for arch, _ in points}
    if len(points) < 3 or len(shapes) != 1:
        raise ModelError(f"a latency table takes at least 3 points of one family and hidden size, got {len(points)}")
    if not all(ms > 0 for _, ms in points):
        raise ModelError("a latency table takes latencies over 0 ms")
    basis = _Basis.of([arch for arch, _ in points], by_source=by_source)
    rows = np.stack([basis.row(arch) for arch, _ in points])
    ms = np.array([value for _, value in points])
    table = basis.table(_solve(rows, ms, basis), conditions, *shapes.pop())
    return replace(table, error=_left_out(rows, ms, basis))


@dataclass(frozen=True)
class _Basis:
    """Columns of the fit: base, fixed cost per source, one increment per knot interval of each curve."""

    sources: tuple[int, ...]
    head_knots: tuple[float, ...]
    neuron_knots: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, archs: Sequence[Arch], *, by_source: bool) -> _Basis:
        layers = [layer for arch in archs for layer in arch.layers]
        sources = tuple(sorted({layer.source for layer in layers})) if by_source else (ANY_SOURCE,)
        widths = [[layer.neurons for layer in layers if source in (ANY_SOURCE, layer.source)] for source in sources]
        return cls(sources, _knots([layer.heads for layer in layers]), tuple(_knots(width) for width in widths))

    def row(self, arch: Arch) -> Floats:
        """What one architecture has of each column."""
        fixed = np.zeros(len(self.sources))
        heads = np.zeros(len(self.head_knots) - 1)
        neurons = [np.zeros(len(knots) - 1) for knots in self.neuron_knots]
        for layer in arch.layers:
            place = 0 if self.sources == (ANY_SOURCE,) else self.sources.index(layer.source)
            fixed[place] += 1
            heads += _filled(layer.heads, self.head_knots)
            neurons[place] += _filled(layer.neurons, self.neuron_knots[place])
        return np.concatenate([[1.0], fixed, heads, *neurons])

    def curves(self) -> list[tuple[int, tuple[float, ...]]]:
        """First column and knots of each curve."""
        starts, column = [], 1 + len(self.sources)
        for knots in (self.head_knots, *self.neuron_knots):
            starts.append((column, knots))
            column += len(knots) - 1
        return starts

    def table(self, solution: Floats, conditions: Conditions, family: str, hidden: int) -> LatencyTable:
        """Read the fitted columns back as a table."""
        heads, *neurons = (
            Curve(knots, (0.0, *np.cumsum(solution[start : start + len(knots) - 1]).tolist()))
            for start, knots in self.curves()
        )
        fixed = solution[1 : 1 + len(self.sources)].tolist()
        return LatencyTable(
            conditions=conditions,
            family=family,
            hidden=hidden,
            base_ms=float(solution[0]),
            layer_ms=dict(zip(self.sources, fixed, strict=True)),
            heads=heads,
            neurons=dict(zip(self.sources, neurons, strict=True)),
        )


def _knots(values: Sequence[int]) -> tuple[float, ...]:
    distinct = np.unique(np.asarray([0, *values], dtype=float))
    if len(distinct) > MAX_KNOTS:
        distinct = distinct[np.linspace(0, len(distinct) - 1, MAX_KNOTS).round().astype(int)]
    return tuple(distinct.tolist())


def _filled(x: float, knots: Sequence[float]) -> Floats:
    """How much of each interval between knots lies under `x` [len(knots) - 1]; over 1 beyond the last one."""
    edges = np.asarray(knots)
    part: Floats = np.clip((x - edges[:-1]) / np.diff(edges), 0.0, 1.0)
    if len(part) and x > edges[-1]:
        part[-1] = (x - edges[-2]) / (edges[-1] - edges[-2])
    return part


def _solve(rows: Floats, ms: Floats, basis: _Basis) -> Floats:
    from scipy.optimize import nnls

    smooth = []
    for start, knots in basis.curves():
        widths = np.diff(knots)
        scale = SMOOTHNESS * float(knots[-1])
        for step in range(len(widths) - 1):
            line = np.zeros(rows.shape[1])
            line[start + step], line[start + step + 1] = scale / widths[step], -scale / widths[step + 1]
            smooth.append(line / float(np.median(ms)))
    left = np.vstack([rows / ms[:, None], *smooth]) if smooth else rows / ms[:, None]
    right = np.concatenate([np.ones(len(ms)), np.zeros(len(smooth))])
    solution: Floats = nnls(left, right, maxiter=50 * left.shape[1])[0]
    return solution


def _left_out(rows: Floats, ms: Floats, basis: _Basis) -> dict[str, float]:
    errors = []
    for index in range(len(ms)):
        kept = np.arange(len(ms)) != index
        predicted = float(rows[index] @ _solve(rows[kept], ms[kept], basis))
        errors.append(abs(predicted / ms[index] - 1))
    median, p90, worst = np.quantile(errors, (0.5, 0.9, 1.0)).tolist()
    return {"median": median, "p90": p90, "max": worst, "n": len(errors)}


def _curve(data: Mapping[str, Any]) -> Curve:
    knots, ms = tuple(map(float, data["knots"])), tuple(map(float, data["ms"]))
    if len(knots) != len(ms) or sorted(set(knots)) != list(knots) or not knots:
        raise ValueError("a curve's knots must rise and each have a cost")
    return Curve(knots, ms)
