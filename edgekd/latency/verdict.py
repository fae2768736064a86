"""Does the latency meet the budget: pass, fail, or not to be told apart from the noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.latency.stats import Interval, Measurement

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
EXIT_CODES = {PASS: 0, FAIL: 3, INCONCLUSIVE: 5}
MAX_LOOKS = 4
ONE_FIGURE = ("vendor_estimate", "predicted")


@dataclass(frozen=True)
class Verdict:
    """The judgement of one target; `reason` holds the figures it rests on."""

    target: str
    status: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The manifest's verdict object."""
        return asdict(self)


def judge(measurement: Measurement, *, latency_p95_ms: float | None = None, speedup: float | None = None) -> Verdict:
    """Compare a measurement with a budget in milliseconds of p95, or as a ratio of medians, or both.

    Pass only if the whole 99 % interval is within the budget, fail only if it is wholly outside, else inconclusive.
    With both budgets, one failure fails and both must pass. Without a figure a budget is not met: the reason says so.
    A prediction or an estimate has no interval; it is compared as it is and named for what it is.
    """
    if latency_p95_ms is None and speedup is None:
        return Verdict(measurement.target, PASS, "no latency budget was given")
    if measurement.kind == "unavailable":
        return Verdict(measurement.target, FAIL, f"not measured, so no budget is met: {measurement.reason}")
    parts = []
    if latency_p95_ms is not None:
        parts.append(_judge_latency(measurement, latency_p95_ms))
    if speedup is not None:
        parts.append(_judge_speedup(measurement, speedup))
    statuses = [status for status, _ in parts]
    worst = next(status for status in (FAIL, INCONCLUSIVE, PASS) if status in statuses)
    return Verdict(measurement.target, worst, "; ".join(reason for _, reason in parts))


def decide(
    measure_more: Callable[[int], Measurement],
    *,
    latency_p95_ms: float | None = None,
    speedup: float | None = None,
    clear: Callable[[Measurement], bool] = lambda measurement: True,
    max_looks: int = MAX_LOOKS,
) -> tuple[Measurement, Verdict]:
    """Measure, judge, and measure more while the verdict is inconclusive, at most `max_looks` times.

    `clear` may ask for more than the verdict needs.

    `measure_more(look)` (0, 1, …) takes further samples and returns the measurement over all samples so far; let it
    take as many again as there are, so that the interval shrinks by a third at each look.
    """
    for look in range(max_looks):
        measurement = measure_more(look)
        verdict = judge(measurement, latency_p95_ms=latency_p95_ms, speedup=speedup)
        if verdict.status != INCONCLUSIVE and clear(measurement):
            break
    return measurement, verdict


def _judge_latency(measurement: Measurement, budget: float) -> tuple[str, str]:
    value, interval, name = measurement.p95_ms, measurement.p95_ci99_ms, "p95"
    if value is None and measurement.kind in ONE_FIGURE:
        # Such a source states one figure and knows no percentiles: that figure is what there is to compare.
        value, interval, name = measurement.p50_ms, None, f"the {measurement.kind.replace('_', ' ')} of"
    if value is None:
        return INCONCLUSIVE, f"p95 is not known ({measurement.kind}), budget {budget:g} ms"
    low, high = interval or (value, value)
    status = PASS if high <= budget else FAIL if low > budget else INCONCLUSIVE
    verb = {PASS: "is within", FAIL: "is over", INCONCLUSIVE: "cannot be told apart from"}[status]
    bounds = _bounds(interval, " ms", measurement)
    return status, f"{name} {value:.4g} ms ({bounds}) {verb} the budget of {budget:g} ms"


def _judge_speedup(measurement: Measurement, budget: float) -> tuple[str, str]:
    value, interval = measurement.speedup, measurement.speedup_ci99
    if value is None:
        return INCONCLUSIVE, f"the speedup was not measured (no teacher beside it), budget {budget:g}×"
    low, high = interval or (value, value)
    status = PASS if low >= budget else FAIL if high < budget else INCONCLUSIVE
    verb = {PASS: "reaches", FAIL: "misses", INCONCLUSIVE: "cannot be told apart from"}[status]
    return status, f"speedup {value:.4g}× ({_bounds(interval, '×', measurement)}) {verb} the budget of {budget:g}×"


def _bounds(interval: Interval | None, unit: str, measurement: Measurement) -> str:
    if interval is None:
        return f"{measurement.kind.replace('_', ' ')}, no interval" + (
            " and no p95" if measurement.p95_ms is None else ""
        )
    low, high = interval
    if math.isinf(high):
        return f"{measurement.n} samples are too few to bound it"
    return f"99 % interval {low:.4g}–{high:.4g}{unit}, n={measurement.n}"
