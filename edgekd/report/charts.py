"""What a profile's plots show, as plain data; `svg` and `png` draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MOST_BINS = 80
BLOCKS_SHOWN = 400
BARS_SHOWN = 14
# The histogram ends here, or where so many times the spread of the quicker nine tenths are over; how many samples lie
# beyond is told, and none is dropped from a figure.
SHOWN_SHARE, SHOWN_SPREADS = 0.995, 4.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line through `x` and `y`, with the ends `low` and `high` of an interval at each point if there are any."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    points: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One plot: lines with `marks` at some x, or horizontal `bars` (label, value, text beside it).

    The vertical axis begins at zero if `from_zero`, unless it is logarithmic (`log`).
    """

    key: str
    title: str
    x_label: str
    y_label: str = ""
    series: tuple[Series, ...] = ()
    marks: tuple[tuple[float, str], ...] = ()
    bars: tuple[tuple[str, float, str], ...] = ()
    from_zero: bool = True
    log: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Raw:
    """Raw latencies of one model: `ms` [n] in the order they were taken, `block` [n]."""

    name: str
    ms: Floats
    block: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def charts(document: Mapping[str, Any], samples: Sequence[Raw]) -> tuple[Chart, ...]:
    """The plots of a profile: `document` is its JSON, `samples` the raw figures of its models (not of the sweeps)."""
    return tuple(_charts(document, samples))


def _charts(document: Mapping[str, Any], samples: Sequence[Raw]) -> Iterator[Chart]:
    if samples:
        yield _distribution(samples, document["latency"][0])
        yield _percentiles(samples)
        yield _drift(samples)
    for axis, label in (("batch", "examples per inference"), ("sequence", "tokens per example")):
        rows = [row for row in document.get("batches" if axis == "batch" else "sequences", []) if "p50_ms" in row]
        if rows:
            yield _curve(rows, axis, label, "p50_ms", "ci95_ms", "median latency", "ms")
            yield _curve(rows, axis, label, "throughput", "throughput_ci95", "throughput", "examples per second")
    if document.get("operators"):
        yield _operators(document["operators"])
    if document.get("placement"):
        yield _placement(document["placement"])


def _distribution(samples: Sequence[Raw], latency: Mapping[str, Any]) -> Chart:
    end = max(_end(part.ms) for part in samples)
    start = min(float(part.ms.min()) for part in samples)
    end = end if end > start else start * 1.01 + 1e-9
    bins = min(MOST_BINS, 10 + 2 * math.isqrt(min(len(part.ms) for part in samples)))
    edges = np.linspace(start, end, bins + 1)
    series = []
    for part in samples:
        counts, _ = np.histogram(part.ms, edges)
        share = 100 * counts / len(part.ms)
        series.append(Series(name=part.name, x=_floats(np.repeat(edges, 2)[1:-1]), y=_floats(np.repeat(share, 2))))
    beyond = ", ".join(f"{int((part.ms > end).sum())} of {len(part.ms)} of {part.name}" for part in samples)
    marks = [(latency[key], key[:3]) for key in ("p50_ms", "p95_ms") if latency.get(key) is not None]
    return Chart(
        key="distribution", title="Distribution of latencies", x_label="ms", y_label="% of samples",
        series=tuple(series), marks=tuple(marks), caption=f"Samples beyond the right edge: {beyond}.",
    )  # fmt: skip


def _end(ms: Floats) -> float:
    middle, high, last = np.quantile(ms, (0.5, 0.9, SHOWN_SHARE))
    return float(max(high, min(last, middle + SHOWN_SPREADS * (high - ms.min()))))


def _percentiles(samples: Sequence[Raw]) -> Chart:
    """The latency at each percentile up to 99.9: what a histogram hides in its tail."""
    percent = np.concatenate([np.linspace(0, 99, 100), [99.5, 99.9]])
    series = [
        Series(name=part.name, x=_floats(percent), y=_floats(np.quantile(part.ms, percent / 100))) for part in samples
    ]
    return Chart(
        key="percentiles", title="Latency by percentile", x_label="percentile", y_label="ms", series=tuple(series),
        marks=((50.0, "p50"), (95.0, "p95")), log=True,
    )  # fmt: skip


def _drift(samples: Sequence[Raw]) -> Chart:
    series = []
    for part in samples:
        labels = np.unique(part.block)
        every = -(-len(labels) // BLOCKS_SHOWN)
        kept = [part.ms[part.block == label] for label in labels[::every]]
        low, middle, high = (tuple(float(np.quantile(block, level)) for block in kept) for level in (0.1, 0.5, 0.9))
        series.append(Series(name=part.name, x=_floats(labels[::every]), y=middle, low=low, high=high))
    return Chart(
        key="drift", title="Over the time of the measurement", x_label="block", y_label="ms", series=tuple(series),
        caption="Median of each block; the band holds its 10th to 90th percentile.",
    )  # fmt: skip


def _curve(
    rows: Sequence[Mapping[str, Any]], axis: str, label: str, key: str, interval: str, title: str, unit: str
) -> Chart:
    rows = sorted(rows, key=lambda row: row[axis])
    ends = [row.get(interval) or (row[key], row[key]) for row in rows]
    line = Series(
        name=title,
        x=tuple(float(row[axis]) for row in rows),
        y=tuple(row[key] for row in rows),
        # An end that too few samples bound is open: nothing is drawn there.
        low=tuple(row[key] if low is None else low for row, (low, _) in zip(rows, ends, strict=True)),
        high=tuple(row[key] if high is None else high for row, (_, high) in zip(rows, ends, strict=True)),
        points=True,
    )
    return Chart(
        key=f"{axis}-{title.split()[-1]}", title=f"{title.capitalize()} by {axis}", x_label=label, y_label=unit,
        series=(line,), caption="The band is the 95 % interval.",
    )  # fmt: skip


def _operators(rows: Sequence[Mapping[str, Any]]) -> Chart:
    timed = [row for row in rows if row["share"] is not None]
    key, unit = ("share", "share of time") if timed else ("calls", "nodes per inference")
    chosen = sorted(timed or rows, key=lambda row: -row[key])
    several = len({row["provider"] for row in rows}) > 1
    bars = [
        (f"{row['type']} ({_short(row['provider'])})" if several else row["type"], row[key],
         f"{row[key]:.1%}" if timed else f"{row[key]:g}")
        for row in chosen[:BARS_SHOWN]
    ]  # fmt: skip
    rest = chosen[BARS_SHOWN:]
    if rest:
        value = sum(row[key] for row in rest)
        bars.append((f"{len(rest)} more", value, f"{value:.1%}" if timed else f"{value:g}"))
    return Chart(key="operators", title="Operators", x_label=unit, bars=tuple(bars))


def _placement(rows: Sequence[Mapping[str, Any]]) -> Chart:
    bars = []
    for row in rows:
        name = _short(row["provider"])
        bars.append((f"{name}: nodes", row["node_share"], f"{row['node_share']:.1%} ({row['nodes']:g})"))
        if row["time_share"] is not None:
            bars.append((f"{name}: time", row["time_share"], f"{row['time_share']:.1%}"))
    return Chart(key="placement", title="Placement", x_label="share", bars=tuple(bars))


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
