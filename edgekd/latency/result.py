"""What one profile found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.devices import Estimate, Operator
from edgekd.latency.comparison import Comparison
from edgekd.latency.estimate import described
from edgekd.latency.placement import Share, explain
from edgekd.latency.plain import plain
from edgekd.latency.stats import Interval, Measurement, Samples
from edgekd.latency.sweep import Point, rate
from edgekd.latency.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """What is known of a model's latency; `samples` holds the raw figures (the baseline's last, if there is one).

    `operators`, `placement` and `fallback` (what does not run on `wanted`) are empty unless asked for,
    `batches` and `sequences` hold a point for each size asked. `estimate` is what a vendor's compiler said, if that
    is where the figure comes from, and `kept` the folder with what it made.
    """

    model: Path
    measurement: Measurement
    verdict: Verdict | None = None
    mean_ci95_ms: Interval | None = None
    operators: tuple[Operator, ...] = ()
    placement: tuple[Share, ...] = ()
    fallback: tuple[Operator, ...] = ()
    wanted: str = ""
    batches: tuple[Point, ...] = ()
    sequences: tuple[Point, ...] = ()
    comparison: Comparison | None = None
    estimate: Estimate | None = None
    kept: Path | None = None
    samples: tuple[Samples, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The `latency` and `verdict` lists of the bundle manifest, and whatever else was asked for."""
        latency = self.measurement.to_dict()
        if self.mean_ci95_ms is not None:
            bounds = rate(self.measurement.batch, self.mean_ci95_ms)
            latency |= {"mean_ci95_ms": plain(self.mean_ci95_ms), "throughput_ci95": plain(bounds)}
        more: dict[str, Any] = {
            "operators": [plain(vars(row)) for row in self.operators],
            "placement": [plain(vars(row)) for row in self.placement],
            "fallback": [plain(vars(row)) for row in self.fallback],
            "batches": [point.to_dict("batch") for point in self.batches],
            "sequences": [point.to_dict("sequence") for point in self.sequences],
            "comparison": self.comparison.to_dict() if self.comparison else None,
            "estimate": described(self.estimate, self.kept) if self.estimate else None,
        }
        return {
            "model": str(self.model),
            "latency": [latency],
            "verdict": [self.verdict.to_dict()] if self.verdict else [],
            **{key: value for key, value in more.items() if value},
            "conditions": dict(self.conditions),
        }

    def fallback_problem(self) -> str:
        """What speaks against the whole model running where the target wants it; empty if nothing does."""
        if not self.operators:
            return "where the operators run is not known: the target gave no trace of them"
        return explain(self.fallback, self.wanted) if self.fallback else ""

    def all_samples(self) -> tuple[Samples, ...]:
        """The raw figures of the models and of every size of the sweeps."""
        return (*self.samples, *(point.samples for point in (*self.batches, *self.sequences) if point.samples))
