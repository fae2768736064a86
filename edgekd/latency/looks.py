"""Samples collected over several looks, until what was asked is clear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from edgekd.latency import stats
from edgekd.latency.artifact import Artifact
from edgekd.latency.bench import Settings
from edgekd.latency.comparison import UNCLEAR, Comparison, compare, judged
from edgekd.latency.conditions import conditions
from edgekd.latency.stats import Measurement, Samples
from edgekd.latency.sweep import Axis
from edgekd.latency.workload import Fed, Workload

Say = Callable[[str], None]


class Budget(TypedDict):
    """What the latency is judged by: milliseconds of p95, times faster than the baseline."""

    latency_p95_ms: float | None
    speedup: float | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one call of `profile` asks for."""

    models: Mapping[str, Artifact]
    workload: Workload
    budget: Budget
    tell_apart: bool
    sweeps: Mapping[Axis, tuple[int, ...]]
    per_operator: bool
    settings: Settings
    say: Say

    @property
    def model(self) -> Artifact:
        """The model itself."""
        return self.models["model"]

    @property
    def has_budget(self) -> bool:
        """Whether there is anything to judge by."""
        return any(value is not None for value in self.budget.values())

    def conditions(self, samples: Sequence[Samples] = ()) -> dict[str, Any]:
        """Under which conditions `samples` were taken."""
        paths = {name: model.path for name, model in self.models.items()}
        return conditions(self.workload, paths, self.settings, samples)


class Looks:
    """Samples collected over several looks, each in a fresh process and as long as all before it."""

    def __init__(self, fed: Sequence[Fed], asked: Asked) -> None:
        self.fed, self.asked = fed, asked
        self.samples: tuple[Samples, ...] = ()

    def more(self, look: int) -> Measurement:
        """Take further samples and summarize all of them."""
        names = " and ".join(str(model.subject.path) for model in self.fed)
        self.asked.say(f"measuring {names}" if look == 0 else "too close to tell: measuring again, longer")
        settings, factor = self.asked.settings, 2 ** max(0, look - 1)
        longer = replace(
            settings,
            blocks=settings.blocks * factor,
            min_runs=settings.min_runs * factor,
            max_seconds=settings.max_seconds * factor,
            memory=settings.memory and look == 0,
            seed=settings.seed + look,
        )
        taken = self.asked.workload.measure(self.fed, longer)
        earlier = [[part] for part in self.samples] or [[] for _ in taken]
        self.samples = tuple(stats.join([*parts, now]) for parts, now in zip(earlier, taken, strict=True))
        baseline = self.samples[1] if len(self.samples) > 1 else None
        return stats.summarize(self.samples[0], target=self.asked.workload.target.name, baseline=baseline)

    def is_clear(self, measurement: Measurement) -> bool:
        """Whether it is known which model is faster, if that was asked."""
        if not self.asked.tell_apart or measurement.speedup is None:
            return True
        return judged(measurement.speedup, measurement.speedup_ci99) != UNCLEAR

    def comparison(self, models: Mapping[str, Artifact], measurement: Measurement) -> Comparison | None:
        """The model (B) against the baseline (A), if there is one."""
        if len(self.samples) < 2:
            return None
        of_baseline = stats.summarize(self.samples[1], target=measurement.target)
        return compare(models["baseline"].path, models["model"].path, of_baseline, measurement)
