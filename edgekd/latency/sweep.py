"""A model at several sizes: batches or sequence lengths, measured in turns so that drift is common to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from edgekd.errors import ModelError, TargetError
from edgekd.latency import stats
from edgekd.latency.artifact import Artifact
from edgekd.latency.bench import Settings
from edgekd.latency.plain import plain
from edgekd.latency.stats import Interval, Measurement, Samples
from edgekd.latency.workload import Fed, Workload

Axis = Literal["batch", "sequence"]
# Enough to find out whether a size runs at all.
TRIAL = Settings(blocks=1, min_runs=1, block_ms=1.0, warmup_seconds=0.0, max_seconds=60.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of a sweep, with its measurement and examples per second, or the reason why there are none."""

    size: int
    measurement: Measurement | None = None
    throughput_ci95: Interval | None = None
    reason: str = ""
    samples: Samples | None = None

    def to_dict(self, axis: Axis) -> dict[str, Any]:
        """Plain data."""
        if self.measurement is None:
            return {axis: self.size, "reason": self.reason}
        known = self.measurement.to_dict()
        return {axis: self.size, **known, "throughput_ci95": plain(self.throughput_ci95)}


def sweep(
    workload: Workload,
    model: Artifact,
    axis: Axis,
    sizes: Sequence[int],
    *,
    settings: Settings,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Point, ...]:
    """Measure a model at each of `sizes`, in order; a size that does not run says why instead.

    Every size is a session of its own, so that the model is in memory once for each.
    """
    reasons: dict[int, str] = {}
    fed: dict[int, Fed] = {}
    for size in dict.fromkeys(sizes):
        try:
            fed[size] = _fed(workload, model, axis, size)
        except ModelError as error:
            reasons[size] = str(error)
    if fed:
        say(f"measuring {axis} {', '.join(map(str, fed))}")
    taken = _measure(workload, fed, reasons, settings)
    return tuple(
        _point(size, taken[size], workload.target.name) if size in taken else Point(size=size, reason=reasons[size])
        for size in dict.fromkeys(sizes)
    )


def mean_interval(samples: Samples, *, level: float = stats.REPORTED, seed: int = 0) -> Interval:
    """Confidence interval of the mean in milliseconds, from the same block bootstrap as the ratio of medians."""
    labels, index = np.unique(samples.block, return_inverse=True)
    length = stats.run_length(stats.medians(samples.ms, index, len(labels)))
    counts = stats.resample(len(labels), length, seed=seed)
    sums = np.bincount(index, weights=samples.ms)
    means = (counts @ sums) / (counts @ np.bincount(index))
    return stats.expanded_percentiles(means, level, len(labels) / length)


def rate(batch: int, mean_ms: Interval) -> Interval:
    """Examples per second at both ends of an interval of the mean, the slower end first."""
    low, high = mean_ms
    return 1000.0 * batch / high, 1000.0 * batch / low


def _fed(workload: Workload, model: Artifact, axis: Axis, size: int) -> Fed:
    asked: Mapping[str, int] = {axis: size}
    return workload.feed(f"{axis} {size}", model, batch=asked.get("batch"), sequence=asked.get("sequence"))


def _measure(
    workload: Workload, fed: Mapping[int, Fed], reasons: dict[int, str], settings: Settings
) -> dict[int, Samples]:
    """Samples of the sizes that run; `reasons` gets an entry for each that does not."""
    running = dict(fed)
    try:
        return _together(workload, running, settings)
    except (ModelError, TargetError) as error:
        # One size that does not run brings down all of them: find out which, each in a process of its own.
        for size, model in fed.items():
            try:
                workload.measure([model], TRIAL)
            except (ModelError, TargetError) as own:
                reasons[size] = str(own)
                del running[size]
        if len(running) == len(fed):
            reasons.update(dict.fromkeys(fed, f"the sizes run one by one, but not together: {error}"))
            return {}
    return _together(workload, running, settings)


def _together(workload: Workload, fed: Mapping[int, Fed], settings: Settings) -> dict[int, Samples]:
    if not fed:
        return {}
    return dict(zip(fed, workload.measure(list(fed.values()), settings), strict=True))


def _point(size: int, samples: Samples, target: str) -> Point:
    bounds = rate(samples.batch, mean_interval(samples))
    measured = replace(stats.summarize(samples, target=target), load_ms=None, first_ms=None)
    return Point(size=size, measurement=measured, throughput_ci95=bounds, samples=samples)
