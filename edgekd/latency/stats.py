"""From raw samples to percentiles, with intervals that know that neighbouring samples resemble each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.latency.plain import plain

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Interval = tuple[float, float]

QUANTILES = (0.50, 0.90, 0.95, 0.99)
REPLICATES = 2000
# Verdicts use the wider interval, so that looking several times still errs in fewer than 5 % of cases.
REPORTED, VERDICT = 0.95, 0.99
_GRID = 4096


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Raw latencies of one model.

    `ms` [n] in milliseconds in the order they were taken, `block` [n] the block each was taken in; models measured
    together share the blocks. `load_ms`, `first_ms` are the time to load and the first inference; `peak_rss_mb` the
    peak memory of a process of its own (Python and the runtime included). `settled` says whether the warm-up came to
    rest, `preemptions` how often the system took a core away while samples were taken.

    `facts` are what the measuring process found on its machine, None or left out where that machine does not say:
    `cpu`, `governor`, `python`, `runtime` (text), `load` (average before it began), `max_mhz` of the CPUs used, and
    just before and just after timing (both warm) `celsius_before`, `celsius_after` (hottest zone), `mhz_before`,
    `mhz_after` (slowest CPU used).
    """

    name: str
    ms: Floats
    block: Integers
    batch: int = 1
    sequence: int | None = None
    threads: int = 1
    cpus: tuple[int, ...] = ()
    load_ms: float | None = None
    first_ms: float | None = None
    peak_rss_mb: float | None = None
    settled: bool = True
    preemptions: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is known of one model's latency on one target, in milliseconds.

    `kind` is `measured`, `vendor_estimate`, `predicted` or `unavailable` (then no figure is given and `reason` says
    why). `ci95_ms` is the 95 % interval of p50. An upper end of None: too few samples to bound that percentile.
    """

    target: str
    kind: str
    batch: int = 1
    sequence: int | None = None
    threads: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    mean_ms: float | None = None
    min_ms: float | None = None
    ci95_ms: Interval | None = None
    p90_ci95_ms: Interval | None = None
    p95_ci95_ms: Interval | None = None
    p99_ci95_ms: Interval | None = None
    p95_ci99_ms: Interval | None = None
    n: int = 0
    load_ms: float | None = None
    first_ms: float | None = None
    peak_rss_mb: float | None = None
    throughput: float | None = None
    teacher_p50_ms: float | None = None
    speedup: float | None = None
    speedup_ci95: Interval | None = None
    speedup_ci99: Interval | None = None
    reason: str = ""
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The manifest's latency object: figures to five significant digits, infinite ends as None."""
        return {key: plain(value) for key, value in vars(self).items() if value not in ("", ())}


def unavailable(target: str, reason: str, *, batch: int = 1, sequence: int | None = None) -> Measurement:
    """A target that could not be measured: the reason and no figure."""
    return Measurement(target=target, kind="unavailable", batch=batch, sequence=sequence, reason=reason)


def summarize(samples: Samples, *, target: str, baseline: Samples | None = None, seed: int = 0) -> Measurement:
    """Percentiles and intervals of `samples`, and the ratio of medians to a baseline measured in the same blocks."""
    levels = intervals(samples.ms, samples.block, QUANTILES, level=REPORTED)
    strict = intervals(samples.ms, samples.block, (0.95,), level=VERDICT)
    p50, p90, p95, p99 = (float(value) for value in np.quantile(samples.ms, QUANTILES))
    mean = float(samples.ms.mean())
    ratio: dict[str, Any] = {}
    if baseline is not None:
        ratio = {
            "teacher_p50_ms": float(np.median(baseline.ms)),
            "speedup": float(np.median(baseline.ms)) / p50,
            "speedup_ci95": ratio_interval(baseline, samples, level=REPORTED, seed=seed),
            "speedup_ci99": ratio_interval(baseline, samples, level=VERDICT, seed=seed),
        }
    return Measurement(
        target=target,
        kind="measured",
        batch=samples.batch,
        sequence=samples.sequence,
        threads=samples.threads,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        mean_ms=mean,
        min_ms=float(samples.ms.min()),
        ci95_ms=levels[0],
        p90_ci95_ms=levels[1],
        p95_ci95_ms=levels[2],
        p99_ci95_ms=levels[3],
        p95_ci99_ms=strict[0],
        n=len(samples.ms),
        load_ms=samples.load_ms,
        first_ms=samples.first_ms,
        peak_rss_mb=samples.peak_rss_mb,
        throughput=1000.0 * samples.batch / mean,
        **ratio,
    )


def intervals(ms: Floats, block: Integers, quantiles: Sequence[float], *, level: float) -> list[Interval]:
    """Confidence intervals of quantiles of `ms` [n], taken in blocks `block` [n].

    A circular block bootstrap (Politis and Romano, 1992) tells how many independent samples these n are worth; the
    binomial bounds of the share of samples under the quantile are then read back through the empirical distribution
    (Woodruff, 1952). An end that so few samples cannot bound is 0 or infinity. The bootstrap of a share needs no
    random draws: its variance over all of them has a closed form.
    """
    labels, index = np.unique(block, return_inverse=True)
    length = run_length(medians(ms, index, len(labels)))
    # The median is always looked at: it shows slow drift that the few samples of a tail hide.
    worth = [independent_samples(ms, index, length, quantile) for quantile in (0.5, *quantiles)]
    t = student(level, len(labels) / length)
    ends = [share_bounds(quantile, min(worth[0], own), t) for quantile, own in zip(quantiles, worth[1:], strict=True)]
    ordered = np.sort(ms)
    return [(_value_at(ordered, low, 0.0), _value_at(ordered, high, math.inf)) for low, high in ends]


def independent_samples(ms: Floats, index: Integers, length: int, quantile: float) -> float:
    """How many independent samples would leave the share of samples under `quantile` as uncertain as these do.

    The variance is that of a circular block bootstrap that draws runs of `length` blocks; at most all n are counted.
    """
    under = ms <= np.quantile(ms, quantile)
    excess = np.bincount(index, weights=under - under.mean())
    ring = np.cumsum(np.concatenate([[0.0], excess, excess[: length - 1]]))
    runs = ring[length:] - ring[:-length]
    variance = len(excess) / length * float(np.mean(runs**2)) / len(ms) ** 2
    return min(float(len(ms)), quantile * (1 - quantile) / variance) if variance > 0 else float(len(ms))


def share_bounds(quantile: float, n: float, t: float) -> Interval:
    """Shares of samples between which the true quantile lies: binomial bounds for `n` samples, `t` deviations wide.

    The second term corrects for the skewness of the binomial distribution far from one half.
    """
    deviation = math.sqrt(quantile * (1 - quantile) / n)
    skew = (1 - 2 * quantile) * (t * t - 1) / (6 * n)
    return quantile + skew - t * deviation, quantile + skew + t * deviation


def student(level: float, blocks: float) -> float:
    """Student's t for `blocks` independent blocks (Cornish-Fisher expansion; good to a percent from 4 blocks)."""
    freedom = max(blocks - 1, 3.0)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def ratio_interval(numerator: Samples, denominator: Samples, *, level: float, seed: int = 0) -> Interval:
    """Confidence interval of median(numerator) / median(denominator), resampling the blocks they share as pairs.

    Drift that is common to both cancels, because both are drawn from the same moments.
    """
    labels = np.intersect1d(numerator.block, denominator.block)
    sides = [_within(side, labels) for side in (numerator, denominator)]
    per_block = [medians(ms, index, len(labels)) for ms, index in sides]
    length = run_length(per_block[0] / per_block[1])
    counts = resample(len(labels), length, seed=seed)
    top, bottom = (weighted_medians(ms, index, counts) for ms, index in sides)
    return expanded_percentiles(top / bottom, level, len(labels) / length)


def medians(ms: Floats, index: Integers, blocks: int) -> Floats:
    """The median [blocks] of each block; `index` [n] says which block a sample belongs to."""
    order = np.lexsort((ms, index))
    counts = np.bincount(index, minlength=blocks)
    starts = np.cumsum(counts) - counts
    ordered = ms[order]
    middle: Floats = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) / 2
    return middle


def run_length(series: Floats) -> int:
    """How many neighbouring blocks to draw together: one plus twice the sum of significant autocorrelations of ranks.

    Three times that, since runs cut at their ends and the noise within blocks hide part of the correlation (see
    `bench/verdict_simulation.py`), and at most a sixth of the blocks.
    """
    count = len(series)
    if count < 12:
        return 1
    ranks = np.argsort(np.argsort(series)).astype(float)
    ranks -= ranks.mean()
    total, variance = 0.0, float(ranks @ ranks)
    for lag in range(1, count // 3):
        correlation = float(ranks[:-lag] @ ranks[lag:]) / variance
        if correlation < 1 / math.sqrt(count):
            break
        total += correlation
    return max(1, min(math.ceil(1 + 6 * total), count // 6))


def resample(blocks: int, length: int, *, seed: int, replicates: int = REPLICATES) -> Floats:
    """How often each replicate [replicates, blocks] draws each block, in circular runs of `length` blocks."""
    rng = np.random.default_rng(seed)
    draws = math.ceil(blocks / length)
    starts = rng.integers(0, blocks, size=(replicates, draws))
    drawn = (starts[:, :, None] + np.arange(length)) % blocks
    flat = drawn.reshape(replicates, -1) + blocks * np.arange(replicates)[:, None]
    return np.bincount(flat.ravel(), minlength=replicates * blocks).reshape(replicates, blocks).astype(np.float64)


def weighted_medians(ms: Floats, index: Integers, counts: Floats) -> Floats:
    """Medians [replicates] of samples weighted by how often their block was drawn.

    Works on a grid of at most 4096 of the values, evenly spaced in rank: exact for fewer samples than that.
    """
    values = np.sort(ms)
    if len(values) > _GRID:
        values = values[np.linspace(0, len(values) - 1, _GRID).round().astype(np.int64)]
    cell = np.searchsorted(values, ms, side="left")
    blocks = counts.shape[1]
    histogram = np.bincount(index * len(values) + cell, minlength=blocks * len(values)).reshape(blocks, -1)
    # One product gives every replicate's cumulative count at every grid value.
    below = counts.astype(np.float32) @ np.cumsum(histogram, axis=1).astype(np.float32)
    result: Floats = values[(below >= below[:, -1:] / 2).argmax(axis=1)]
    return result


def expanded_percentiles(replicates: Floats, level: float, blocks: float) -> Interval:
    """The percentile interval of bootstrap replicates, its tails widened for `blocks` blocks (Hesterberg, 2015)."""
    freedom = max(blocks - 1, 3.0)
    tail = NormalDist().cdf(-student(level, blocks) * math.sqrt((freedom + 1) / freedom))
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(low), float(high)


def join(parts: Sequence[Samples]) -> Samples:
    """Samples of one model from several looks, one after the other; blocks are numbered on.

    Facts are the first look's, but those from after timing the last look's.
    """
    first, block, offset = parts[0], [], 0
    ends = {key: value for key, value in parts[-1].facts.items() if key.endswith("_after")}
    for part in parts:
        block.append(part.block + offset)
        offset += int(part.block.max()) + 1
    return Samples(
        **{
            **vars(first),
            "ms": np.concatenate([part.ms for part in parts]),
            "block": np.concatenate(block),
            "settled": all(part.settled for part in parts),
            "preemptions": sum(part.preemptions for part in parts),
            "facts": {**first.facts, **ends},
        }
    )


def _value_at(ordered: Floats, share: float, otherwise: float) -> float:
    place = share * len(ordered)
    return float(ordered[min(math.floor(place), len(ordered) - 1)]) if 0 < share < 1 else otherwise


def _within(samples: Samples, labels: Integers) -> tuple[Floats, Integers]:
    kept = np.isin(samples.block, labels)
    return samples.ms[kept], np.searchsorted(labels, samples.block[kept])
