"""What a reader should know before trusting a measurement; one sentence each, nothing when there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import host
from edgekd.latency.stats import Measurement, Samples, medians, run_length
from edgekd.target import Target

# Beyond these a figure deserves a remark.
WIDE_INTERVAL = 0.05
BUSY_SHARE = 0.5
PREEMPTED_SHARE = 0.05
FREQUENCY_DROP = 0.05
TREND = 0.02
BLOCKS_OF_THIRD = 10
WARMING_C = 10.0
HOT_C = 80.0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """A machine before measuring: load average, usable cores, frequency governor ("" if unknown), boost if known."""

    load: float | None = None
    cores: int = 1
    governor: str = ""
    boost: bool | None = None


def surroundings(target: Target, root: Path = host.ROOT) -> Surroundings:
    """Those of this machine, now; nothing is known of one that is reached over a wire."""
    if target.reach_by != "local":
        return Surroundings()
    return Surroundings(
        load=host.load_average(), cores=host.usable_cores(), governor=host.governor(), boost=boosts(root)
    )


def boosts(root: Path = host.ROOT) -> bool | None:
    """Whether the kernel lets the CPU clock itself beyond its nominal frequency; None where it does not say."""
    folder = root / "sys/devices/system/cpu"
    for name, on in (("cpufreq/boost", "1"), ("intel_pstate/no_turbo", "0")):
        try:
            return (folder / name).read_text(encoding="ascii").strip() == on
        except (OSError, UnicodeDecodeError):
            continue
    return None


def remarks(measurement: Measurement, samples: Sequence[Samples], around: Surroundings) -> tuple[str, ...]:
    """Remarks on a measurement that rests on `samples`, taken in some `around`."""
    return (*_of_samples(measurement, samples), *_of_machine(samples, around))


def _of_samples(measurement: Measurement, samples: Sequence[Samples]) -> Iterator[str]:
    if not all(part.settled for part in samples):
        yield "the warm-up did not come to rest: medians kept moving by more than 2 %"
    if measurement.ci95_ms and measurement.p50_ms:
        low, high = measurement.ci95_ms
        if not high - low <= 2 * WIDE_INTERVAL * measurement.p50_ms:
            yield f"the interval of p50 is wider than ±{WIDE_INTERVAL:.0%}: the machine is noisy"
    yield from _of_trend(samples)
    taken = sum(len(part.ms) for part in samples)
    # Models measured together share one process, whose count each of them carries.
    preempted = max((part.preemptions for part in samples), default=0)
    if preempted > PREEMPTED_SHARE * taken:
        yield f"other processes took the core away {preempted} times while measuring"


def _of_trend(samples: Sequence[Samples]) -> Iterator[str]:
    """Whether the model itself was slower in the last third than in the first: no interval knows where that leads."""
    for part in samples[:1]:
        labels, index = np.unique(part.block, return_inverse=True)
        middle = medians(part.ms, index, len(labels))
        third = len(middle) // 3
        if third < BLOCKS_OF_THIRD:
            continue
        moments = np.arange(len(middle))
        rest = middle - np.polynomial.Polynomial.fit(moments, middle, 1)(moments)
        noise = 1.5 * float(np.median(np.abs(rest))) * math.sqrt(2 * run_length(rest) / third)
        before, after = (float(np.median(side)) for side in (middle[:third], middle[-third:]))
        if abs(after - before) > max(TREND * before, 4 * noise):
            word = "slower" if after > before else "faster"
            share = abs(after / before - 1)
            yield f"the model became {share:.0%} {word} from the first to the last third of the measurement"


def _of_machine(samples: Sequence[Samples], around: Surroundings) -> Iterator[str]:
    facts: Mapping[str, Any] = samples[0].facts if samples else {}
    load = _first(facts.get("load"), around.load)
    if load is not None and load > BUSY_SHARE * around.cores:
        yield f"the machine was busy before the measurement began (load average {load:.1f})"
    yield from _of_clock(facts)
    yield from _of_heat(facts)
    governor = facts.get("governor") or around.governor
    if governor not in ("", "performance"):
        yield f"the frequency governor is {governor!r}, not 'performance'"
    if around.boost:
        yield "the CPU may clock itself beyond its nominal frequency: how far depends on heat and on its other cores"


def _of_clock(facts: Mapping[str, Any]) -> Iterator[str]:
    before, after, most = (facts.get(key) for key in ("mhz_before", "mhz_after", "max_mhz"))
    if before and after and after < (1 - FREQUENCY_DROP) * before:
        yield f"the CPU became slower while measuring: {before:.0f} MHz at the start, {after:.0f} MHz at the end"
    elif after and most and after < (1 - FREQUENCY_DROP) * most:
        yield f"the CPU ran at {after:.0f} MHz of at most {most:.0f} MHz"


def _of_heat(facts: Mapping[str, Any]) -> Iterator[str]:
    before, after = facts.get("celsius_before"), facts.get("celsius_after")
    if after is not None and after >= HOT_C:
        yield f"the machine is hot ({after:.0f} °C at the end): it may have slowed itself down"
    elif before is not None and after is not None and after - before >= WARMING_C:
        yield f"the machine warmed up while measuring, from {before:.0f} to {after:.0f} °C: it may get slower later"


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
