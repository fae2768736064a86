"""Fit a cell: nonnegative least squares on relative errors, then a correction that has to earn its place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgekd.arch import Arch
from edgekd.errors import ModelError
from edgekd.latency.cell import ANY_SOURCE, WHOLE, Cell, Correction, Curve, Floats, Frame, Shapes, Shares

FOLDS = 8
# Most knots of a curve, and the weight of "neighbouring slopes are alike". The first suits noisy points, the second
# devices fast at certain widths only; the one that predicts points left out better is taken.
DETAILS = ((8, 1e-3), (16, 1e-2))
# What the last layer may take of a layer's costs: all, or what is left where it computes for one token alone, which
# are keys and values of all tokens and little besides.
LASTS: tuple[Shares, ...] = (WHOLE, (0.5, 0.5, 0.05))
# Ridge strengths tried for the correction, and how much better than none it must be on points left out.
RIDGES = (3.0, 0.3, 0.03)
EARNS = 0.97
FEWEST_FOR_CORRECTION = 12


def fit(archs: Sequence[Arch], ms: Sequence[float], frame: Frame, *, by_source: bool = False) -> Cell:
    """Fit a cell to measured architectures and their latencies in milliseconds.

    `by_source` fits fixed and inner costs for each source layer by itself: for convolutional stages. The error is
    that of points predicted from the other folds, correction included.

    Raises:
        ModelError: fewer than three points, points of another family or hidden size, or a latency not over 0.
    """
    if len(archs) < 3 or {(arch.family, arch.hidden) for arch in archs} != {(frame.family, frame.hidden)}:
        raise ModelError(f"a latency table takes at least 3 points of one family and hidden size, got {len(archs)}")
    truth = np.asarray(ms, dtype=np.float64)
    if not (truth > 0).all():
        raise ModelError("a latency table takes latencies over 0 ms")
    best: Cell | None = None
    least = np.inf
    for detail, last in itertools.product(DETAILS, LASTS[:1] if by_source else LASTS):
        form = _Form(by_source, *detail, last)
        residual, features = _left_out(archs, truth, frame, form)
        correction, left_over = _correction(features, residual)
        score = float(np.sqrt(np.mean(left_over**2)))
        if score < least:
            errors = np.abs(np.expm1(-left_over))
            median, p90, worst = np.quantile(errors, (0.5, 0.9, 1.0)).tolist()
            error = {"median": median, "p90": p90, "max": worst, "n": len(errors)}
            whole = _additive(archs, truth, frame, form)
            best, least = replace(whole, correction=correction, error=error), score
    if best is None:
        raise ModelError(f"no costs can be fitted to the points of {frame.describe()}: they are not numbers")
    return best


def _left_out(archs: Sequence[Arch], ms: Floats, frame: Frame, form: _Form) -> tuple[Floats, Floats]:
    """Logarithms of truth over prediction [P] from the other folds, and what the correction looks at [P, 4]."""
    count = len(archs)
    order = np.random.default_rng(0).permutation(count)
    residual, features = np.zeros(count), np.zeros((count, 4))
    for fold in range(min(FOLDS, count)):
        left = order[np.arange(count) % min(FOLDS, count) == fold]
        rest = np.setdiff1d(order, left)
        cell = _additive([archs[i] for i in rest], ms[rest], frame, form)
        for i in left:
            parts = cell.parts(Shapes.of([archs[i]]))
            residual[i], features[i] = np.log(ms[i] / parts.total[0]), parts.features()[0]
    return residual, features


def _correction(features: Floats, residual: Floats) -> tuple[Correction, Floats]:
    """The correction that predicts residuals it has not seen best, and those residuals after it (cross-validated)."""
    best, left = Correction(), residual
    if len(residual) < FEWEST_FOR_CORRECTION:
        return best, left
    target = float(np.sqrt(np.mean(residual**2))) * EARNS
    for strength in RIDGES:
        after = np.zeros(len(residual))
        for fold in range(FOLDS):
            out = np.arange(len(residual)) % FOLDS == fold
            after[out] = residual[out] - np.log(_ridge(features[~out], residual[~out], strength).factor(features[out]))
        if (score := float(np.sqrt(np.mean(after**2)))) < target:
            best, left, target = _ridge(features, residual, strength), after, score
    return best, left


def _ridge(features: Floats, residual: Floats, strength: float) -> Correction:
    centre, scale = features.mean(0), features.std(0) + 1e-9
    x, bias = (features - centre) / scale, float(residual.mean())
    weights = np.linalg.solve(x.T @ x + strength * len(x) / 10 * np.eye(x.shape[1]), x.T @ (residual - bias)) / scale
    bounds = features.min(0), features.max(0)
    return Correction(
        tuple(weights.tolist()), bias, tuple(centre.tolist()), tuple(bounds[0].tolist()), tuple(bounds[1].tolist())
    )


def _additive(archs: Sequence[Arch], ms: Floats, frame: Frame, form: _Form) -> Cell:
    basis = _Basis.of(archs, form)
    rows = np.stack([basis.row(arch) for arch in archs])
    return replace(
        basis.cell(_solve(rows, ms, basis, form.smoothness), frame), deepest=max(len(arch.layers) for arch in archs)
    )


@dataclass(frozen=True)
class _Form:
    """What is assumed of the costs: alike for all layers or not, how detailed, and how much the last layer takes."""

    by_source: bool
    knots: int
    smoothness: float
    last: Shares


@dataclass(frozen=True)
class _Basis:
    """Columns of the fit: base, fixed cost per source, one increment per knot interval of each curve."""

    sources: tuple[int, ...]
    head_knots: tuple[float, ...]
    neuron_knots: tuple[tuple[float, ...], ...]
    last: Shares

    @classmethod
    def of(cls, archs: Sequence[Arch], form: _Form) -> _Basis:
        layers = [layer for arch in archs for layer in arch.layers]
        sources = tuple(sorted({layer.source for layer in layers})) if form.by_source else (ANY_SOURCE,)
        widths = [[layer.neurons for layer in layers if source in (ANY_SOURCE, layer.source)] for source in sources]
        heads = _knots([layer.heads for layer in layers], form.knots)
        return cls(sources, heads, tuple(_knots(width, form.knots) for width in widths), form.last)

    def row(self, arch: Arch) -> Floats:
        """What one architecture has of each column."""
        fixed = np.zeros(len(self.sources))
        heads = np.zeros(len(self.head_knots) - 1)
        neurons = [np.zeros(len(knots) - 1) for knots in self.neuron_knots]
        for position, layer in enumerate(arch.layers, start=1):
            shares = self.last if position == len(arch.layers) else WHOLE
            place = 0 if self.sources == (ANY_SOURCE,) else self.sources.index(layer.source)
            fixed[place] += shares[0]
            heads += shares[1] * _filled(layer.heads, self.head_knots)
            neurons[place] += shares[2] * _filled(layer.neurons, self.neuron_knots[place])
        return np.concatenate([[1.0], fixed, heads, *neurons])

    def curves(self) -> list[tuple[int, tuple[float, ...]]]:
        """First column and knots of each curve."""
        starts, column = [], 1 + len(self.sources)
        for knots in (self.head_knots, *self.neuron_knots):
            starts.append((column, knots))
            column += len(knots) - 1
        return starts

    def cell(self, solution: Floats, frame: Frame) -> Cell:
        """Read the fitted columns back."""
        heads, *neurons = (
            Curve(knots, (0.0, *np.cumsum(solution[start : start + len(knots) - 1]).tolist()))
            for start, knots in self.curves()
        )
        fixed = solution[1 : 1 + len(self.sources)].tolist()
        return Cell(
            frame=frame,
            base_ms=float(solution[0]),
            layer_ms=dict(zip(self.sources, fixed, strict=True)),
            heads=heads,
            neurons=dict(zip(self.sources, neurons, strict=True)),
            last=self.last,
        )


def _knots(values: Sequence[int], most: int) -> tuple[float, ...]:
    distinct = np.unique(np.asarray([0, *values], dtype=float))
    if len(distinct) > most:
        distinct = distinct[np.linspace(0, len(distinct) - 1, most).round().astype(int)]
    return tuple(distinct.tolist())


def _filled(x: float, knots: Sequence[float]) -> Floats:
    """How much of each interval between knots lies under `x` [len(knots) - 1]; over 1 beyond the last one."""
    edges = np.asarray(knots)
    part: Floats = np.clip((x - edges[:-1]) / np.diff(edges), 0.0, 1.0)
    if len(part) and x > edges[-1]:
        part[-1] = (x - edges[-2]) / (edges[-1] - edges[-2])
    return part


def _solve(rows: Floats, ms: Floats, basis: _Basis, smoothness: float) -> Floats:
    from scipy.optimize import nnls

    smooth = []
    for start, knots in basis.curves():
        widths = np.diff(knots)
        scale = smoothness * float(knots[-1])
        for step in range(len(widths) - 1):
            line = np.zeros(rows.shape[1])
            line[start + step], line[start + step + 1] = scale / widths[step], -scale / widths[step + 1]
            smooth.append(line / float(np.median(ms)))
    left = np.vstack([rows / ms[:, None], *smooth]) if smooth else rows / ms[:, None]
    right = np.concatenate([np.ones(len(ms)), np.zeros(len(smooth))])
    solution: Floats = nnls(left, right, maxiter=50 * left.shape[1])[0]
    return solution
