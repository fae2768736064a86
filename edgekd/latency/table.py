"""A latency table of one target: measured (or estimated) models, the cells fitted to them, and predictions.

The table keeps every point it was fitted to, so that measuring can stop at any time and go on later, and the points
that were held out, on which its published error rests.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.arch import Arch, Layer
from edgekd.errors import ModelError
from edgekd.files import write_text
from edgekd.latency.cell import Cell, Floats, Frame, Shapes
from edgekd.latency.fit import fit

SCHEMA = 1
FIT, HELD_OUT = "fit", "held_out"
FEWEST = 8
"""Points that a cell needs before it predicts."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Where and how the points were taken; a table holds for these only.

    `kind` is `measured` or `vendor_estimate`, `options` what else the figures depend on.
    """

    target: str
    kind: str = "measured"
    threads: int = 1
    cpu: str = ""
    runtime: str = ""
    date: str = ""
    fingerprint: str = ""
    caveat: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model that was timed: `ms` is its median, `noise` as in `edgekd.calibrate.timing.Timed`."""

    frame: Frame
    layers: tuple[tuple[int, int, int], ...]
    ms: float
    use: str = FIT
    noise: float = 0.0

    @property
    def arch(self) -> Arch:
        """Its shape; `layers` holds source, heads and neurons."""
        layers = tuple(Layer(source=source, heads=heads, neurons=neurons) for source, heads, neurons in self.layers)
        frame = self.frame
        return Arch(family=frame.family, hidden=frame.hidden, head_dim=frame.head_dim, vocabulary=0, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted median in milliseconds. `error` is the 90th percentile of the table's held-out relative error.

    There is none where nothing was held out, or where hidden size, batch or length lie between those measured.
    `extrapolates` names each dimension that lies outside what was measured; the error does not hold there.
    """

    ms: float
    kind: str = "predicted"
    basis: str = "measured"
    error: float | None = None
    extrapolates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What is known of one target. `held_out` is the published error (see `held_out_error`)."""

    conditions: Conditions
    cells: tuple[Cell, ...] = ()
    points: tuple[Point, ...] = ()
    held_out: Mapping[str, Any] = field(default_factory=dict)

    def predict(
        self, arch: Arch, *, lowering: str, batch: int = 1, sequence: int | None = None, outline: str = ""
    ) -> Prediction:
        """Predict one shape; under a millisecond.

        Raises:
            ModelError: the table has nothing on such models, or nothing near this batch or sequence.
        """
        mix = self.mix(frame_of(arch, lowering, batch, sequence, outline))
        beyond = dict.fromkeys([*mix.beyond, *(text for _, cell in mix.cells for text in cell.beyond(arch))])
        return Prediction(
            ms=float(mix.predict([arch])[0]),
            basis=self.conditions.kind,
            error=self._error(arch.family, lowering) if len(mix.cells) == 1 else None,
            extrapolates=tuple(beyond),
        )

    def mix(self, frame: Frame) -> Mix:
        """The cells that together stand for a frame; keep it to predict many shapes at once.

        Raises:
            ModelError: the table has nothing on such models, or nothing near them.
        """
        cells = [cell for cell in self.cells if _alike(cell.frame, frame)]
        if not cells:
            raise ModelError(f"the latency table of {self.conditions.target} has nothing on {frame.describe()}: "
                             f"{self._covered()}")  # fmt: skip
        weights: list[dict[Any, float]] = []
        beyond = []
        for axis in ("hidden", "batch", "sequence"):
            known = sorted({getattr(cell.frame, axis) or 0 for cell in cells})
            between, outside = _between(getattr(frame, axis) or 0, known, axis, frame)
            weights.append(between)
            beyond += [outside] if outside else []
        by_place = {(c.frame.hidden, c.frame.batch, c.frame.sequence or 0): c for c in cells}
        mixed = []
        for (hidden, a), (batch, b), (sequence, c) in itertools.product(*(axis.items() for axis in weights)):
            if (hidden, batch, sequence) not in by_place:
                raise ModelError(f"the latency table of {self.conditions.target} has gaps around {frame.describe()}: "
                                 f"{self._covered()}")  # fmt: skip
            mixed.append((a * b * c, by_place[hidden, batch, sequence]))
        return Mix(tuple(mixed), tuple(beyond))

    def covers(self, frame: Frame) -> bool:
        """Whether the frame can be predicted without extrapolating over hidden size, batch or sequence."""
        try:
            return not self.mix(frame).beyond
        except ModelError:
            return False

    def refit(self, frames: Iterable[Frame] | None = None) -> LatencyTable:
        """Fit the cells of `frames` (default: of all) to the points again, and judge them on the points held out."""
        wanted = set(frames) if frames is not None else {point.frame for point in self.points}
        cells = [cell for cell in self.cells if cell.frame not in wanted]
        for frame in sorted(wanted, key=Frame.describe):
            used = [point for point in self.points if point.frame == frame and point.use == FIT]
            if len(used) >= FEWEST:
                archs, ms = [point.arch for point in used], [point.ms for point in used]
                cells.append(fit(archs, ms, frame, by_source=bool(frame.outline)))
        table = replace(self, cells=tuple(cells))
        return replace(table, held_out=held_out_error(table, [p for p in self.points if p.use == HELD_OUT]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; points are grouped by frame."""
        grouped: dict[Frame, list[list[Any]]] = {}
        for point in self.points:
            row = [point.use, round(point.ms, 6), round(point.noise, 4), [list(layer) for layer in point.layers]]
            grouped.setdefault(point.frame, []).append(row)
        return {
            "schema": SCHEMA,
            "conditions": asdict(self.conditions),
            "held_out": dict(self.held_out),
            "cells": [cell.to_dict() for cell in self.cells],
            "points": [{"frame": asdict(frame), "rows": rows} for frame, rows in grouped.items()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Read what `to_dict` wrote.

        Raises:
            ModelError: a field is missing, unknown or of the wrong kind, or the schema is newer.
        """
        try:
            if int(data["schema"]) > SCHEMA:
                raise ValueError(f"schema {data['schema']} is newer than this edgekd")
            points = [
                Point(frame=Frame(**group["frame"]), use=use, ms=float(ms), noise=float(noise),
                      layers=tuple((int(s), int(h), int(n)) for s, h, n in layers))
                for group in data["points"] for use, ms, noise, layers in group["rows"]
            ]  # fmt: skip
            return cls(
                conditions=Conditions(**data["conditions"]),
                cells=tuple(Cell.from_dict(cell) for cell in data["cells"]),
                points=tuple(points),
                held_out=dict(data["held_out"]),
            )
        except KeyError as error:
            raise ModelError(f"the latency table is damaged: it has no {error}; calibrate again") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"the latency table is damaged: {error}; calibrate again") from None

    def save(self, path: Path) -> None:
        """Write the table as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), separators=(",", ":")).replace('{"frame"', '\n{"frame"') + "\n")

    def _error(self, family: str, lowering: str) -> float | None:
        group = self.held_out.get("groups", {}).get(f"{family} {lowering}", {})
        error = group.get("p90")
        return None if error is None else float(error)

    def _covered(self) -> str:
        frames = sorted({cell.frame for cell in self.cells}, key=Frame.describe)
        if not frames:
            return "it is empty; run `edgekd calibrate`"
        shown = "; ".join(frame.describe() for frame in frames[:6])
        return f"it covers {shown}" + (f" and {len(frames) - 6} more" if len(frames) > 6 else "")


@dataclass(frozen=True)
class Mix:
    """Cells with weights that sum to 1: logarithms of latencies are mixed, so powers of a dimension are exact."""

    cells: tuple[tuple[float, Cell], ...]
    beyond: tuple[str, ...] = ()

    def predict(self, archs: Sequence[Arch]) -> Floats:
        """Median latencies [P] in milliseconds of a population of one family."""
        shapes = Shapes.of(archs)
        logarithm = np.zeros(len(archs))
        for weight, cell in self.cells:
            logarithm += weight * np.log(cell.predict(shapes))
        return np.asarray(np.exp(logarithm))


def frame_of(arch: Arch, lowering: str, batch: int = 1, sequence: int | None = None, outline: str = "") -> Frame:
    """The frame in which an architecture is predicted."""
    return Frame(
        family=arch.family, hidden=arch.hidden, head_dim=arch.head_dim, lowering=lowering, batch=batch,
        sequence=sequence, outline=outline,
    )  # fmt: skip


def held_out_error(table: LatencyTable, points: Sequence[Point]) -> dict[str, Any]:
    """Relative errors of predictions for points that no fit has seen, in all and by family and lowering."""
    errors: dict[str, list[float]] = {}
    for point in points:
        frame = point.frame
        try:
            predicted = float(table.mix(frame).predict([point.arch])[0])
        except ModelError:
            continue
        errors.setdefault(f"{frame.family} {frame.lowering}", []).append(predicted / point.ms - 1)
    everything = [error for group in errors.values() for error in group]
    return {**_summary(everything), "groups": {name: _summary(group) for name, group in sorted(errors.items())}}


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
    try:
        return LatencyTable.from_dict(data)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def find_table(target: str) -> Path | None:
    """The table of a target: `./profiles/NAME.json`, else the shipped one, else None."""
    inside = Path(__file__).parent.parent / "_profiles"
    shipped = inside if inside.is_dir() else Path(__file__).parent.parent.parent / "profiles"
    for folder in (Path("profiles"), shipped):
        if (path := folder / f"{target}.json").is_file():
            return path
    return None


def _alike(own: Frame, asked: Frame) -> bool:
    same = ("family", "head_dim", "lowering", "outline")
    if asked.outline and own.hidden != asked.hidden:
        return False
    return all(getattr(own, key) == getattr(asked, key) for key in same)


def _between(value: float, known: Sequence[float], axis: str, frame: Frame) -> tuple[dict[Any, float], str]:
    """Weights of the known values around `value` on a logarithmic scale, and what to say if it lies outside."""
    if value in known:
        return {value: 1.0}, ""
    if len(known) < 2 or not value:
        raise ModelError(f"the latency table knows {axis} {', '.join(f'{k:g}' for k in known)} only, not "
                         f"{value or 'none'}, for {frame.describe()}")  # fmt: skip
    low = max([k for k in known if k < value], default=known[0])
    place = min(known.index(low), len(known) - 2)
    low, high = known[place], known[place + 1]
    share = math.log(value / low) / math.log(high / low)
    outside = "" if known[0] <= value <= known[-1] else f"{axis} {value:g} (measured: {known[0]:g} to {known[-1]:g})"
    return {low: 1.0 - share, high: share}, outside


def _summary(errors: Sequence[float]) -> dict[str, Any]:
    if not errors:
        return {"n": 0}
    sizes = np.abs(errors)
    median, p90, p99, worst = (float(f"{x:.4g}") for x in np.quantile(sizes, (0.5, 0.9, 0.99, 1.0)))
    within = {f"within_{limit}": float(f"{np.mean(sizes <= limit / 100):.4g}") for limit in (5, 10)}
    bias = float(f"{np.median(errors):.4g}")
    return {"n": len(errors), "median": median, "p90": p90, "p99": p99, "max": worst, "bias": bias, **within}
