"""Which of two models is faster: the ratio of their medians, measured in turns, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.latency.plain import plain
from edgekd.latency.stats import Interval, Measurement

FASTER, SLOWER, SAME, UNCLEAR = "faster", "slower", "same", "unclear"
# Medians that differ by less than this are called the same.
SAME_WITHIN = 0.01


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """B against A: `ratio` is p50(A) / p50(B), over 1 where B is faster; `status` says it in one word."""

    a: Path
    b: Path
    a_measurement: Measurement
    b_measurement: Measurement
    ratio: float
    ratio_ci95: Interval | None
    ratio_ci99: Interval | None
    status: str
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the figures of B are those of the profile itself."""
        return {
            "a": {"model": str(self.a), "latency": self.a_measurement.to_dict()},
            "b": {"model": str(self.b), "latency": self.b_measurement.to_dict()},
            **{key: plain(getattr(self, key)) for key in ("ratio", "ratio_ci95", "ratio_ci99", "status", "conclusion")},
        }


def compare(a: Path, b: Path, a_measurement: Measurement, b_measurement: Measurement) -> Comparison:
    """Compare two measured models; `b_measurement` holds the ratio to A as its speedup.

    Raises:
        ValueError: it holds none.
    """
    ratio = b_measurement.speedup
    if ratio is None:
        raise ValueError("the second measurement has no speedup over the first")
    status = judged(ratio, b_measurement.speedup_ci99)
    return Comparison(
        a=a,
        b=b,
        a_measurement=a_measurement,
        b_measurement=b_measurement,
        ratio=ratio,
        ratio_ci95=b_measurement.speedup_ci95,
        ratio_ci99=b_measurement.speedup_ci99,
        status=status,
        conclusion=conclude(status, ratio, b_measurement.speedup_ci99, b_measurement.kind),
    )


def judged(ratio: float, interval: Interval | None) -> str:
    """Whether B is `faster`, `slower`, the `same` within 1 %, or `unclear` for the width of the interval.

    A difference that is certain but under 1 % still counts as the same: no one would feel it.
    """
    low, high = interval or (ratio, ratio)
    if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN:
        return SAME
    return FASTER if low > 1 else SLOWER if high < 1 else UNCLEAR


def conclude(status: str, ratio: float, interval: Interval | None, kind: str) -> str:
    """The comparison as one plain sentence."""
    bounds = "no interval" if interval is None else "99 % interval {:.4g}–{:.4g}"
    if kind != "measured":
        bounds = f"{kind.replace('_', ' ')}, {bounds}"
    low, high = interval or (ratio, ratio)
    if status == FASTER:
        return f"B is {ratio:.3g}× faster than A ({bounds.format(low, high)})"
    if status == SLOWER:
        return f"B is {1 / ratio:.3g}× slower than A ({bounds.format(1 / high, 1 / low)})"
    if status == SAME:
        return f"A and B take the same time within {SAME_WITHIN:.0%} (ratio {ratio:.4g}, {bounds.format(low, high)})"
    return f"A and B cannot be told apart (ratio {ratio:.4g}, {bounds.format(low, high)})"
