"""Profile one ONNX model on one target: measure, judge, and say how much the figures can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekd import host
from edgekd.devices import Operator, unavailable
from edgekd.latency import stats
from edgekd.latency.artifact import find_artifact
from edgekd.latency.bench import Settings, Subject, measure, trace_operators
from edgekd.latency.stats import Measurement, Samples
from edgekd.latency.verdict import Verdict, decide, judge
from edgekd.target import Target, load_target, probe

# Beyond these a figure deserves a remark.
WIDE_INTERVAL = 0.05
BUSY_SHARE = 0.5
PREEMPTED_SHARE = 0.05


@dataclass(frozen=True)
class ProfileResult:
    """What is known of a model's latency; `samples` holds the raw figures (the baseline's last, if there is one)."""

    model: Path
    measurement: Measurement
    verdict: Verdict | None
    operators: tuple[Operator, ...] = ()
    samples: tuple[Samples, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The `latency` and `verdict` lists of the bundle manifest, and `operators` if they were asked for."""
        result: dict[str, Any] = {
            "latency": [self.measurement.to_dict()],
            "verdict": [self.verdict.to_dict()] if self.verdict else [],
        }
        if self.operators:
            result["operators"] = [vars(row) for row in self.operators]
        return result


def profile(
    model: str | Path,
    target: str | Target = "local",
    *,
    batch: int | None = None,
    sequence: int | None = None,
    threads: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    feeds: Path | None = None,
    baseline: str | Path | None = None,
    latency_p95_ms: float | None = None,
    speedup: float | None = None,
    per_operator: bool = False,
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ProfileResult:
    """Measure an ONNX file, a bundle, or a folder with one model; no recipe is needed.

    With a budget (`latency_p95_ms` in milliseconds, or `speedup` over `baseline`) it keeps measuring, within bounds,
    until the verdict is clear. `batch`, `sequence` and `shapes` choose the inputs (see `edgekd.latency.feeds`).
    `say` hears what is going on. A target that is not there gives a measurement of kind `unavailable`.

    Raises:
        TargetError: no such target, or more threads than this process may use.
        ModelError: a model cannot be found, read, fed, loaded or run.
    """
    target = probe(load_target(target) if isinstance(target, str) else target)
    asked = latency_p95_ms is not None or speedup is not None
    artifacts = {"model": find_artifact(model), **({"baseline": find_artifact(baseline)} if baseline else {})}
    subjects = [
        Subject(name=name, path=item.path, options=item.options, feeds=feeds) for name, item in artifacts.items()
    ]
    if reason := unavailable(target):
        missing = stats.unavailable(target.name, reason, batch=batch or 1, sequence=sequence)
        return ProfileResult(
            subjects[0].path, missing, judge(missing, latency_p95_ms=latency_p95_ms, speedup=speedup) if asked else None
        )
    load = host.load_average()
    inputs: dict[str, Any] = {
        "target": target,
        "batch": batch,
        "sequence": sequence,
        "threads": threads,
        "shapes": shapes,
    }
    looks = _Looks(subjects, inputs, settings or Settings(memory=True), say)
    measurement, verdict = decide(looks.more, latency_p95_ms=latency_p95_ms, speedup=speedup)
    operators: Sequence[Operator] = ()
    if per_operator:
        say("tracing operators")
        operators = trace_operators(subjects[0], **inputs)
    notes = remarks(measurement, looks.samples, load=load)
    return ProfileResult(
        subjects[0].path, replace(measurement, notes=notes), verdict if asked else None, tuple(operators), looks.samples
    )


def remarks(measurement: Measurement, samples: Sequence[Samples], *, load: float | None) -> tuple[str, ...]:
    """What a reader should know before trusting the figures; nothing when there is nothing to say."""
    notes = []
    if not all(part.settled for part in samples):
        notes.append("the warm-up did not come to rest: medians kept moving by more than 2 %")
    if measurement.ci95_ms and measurement.p50_ms:
        low, high = measurement.ci95_ms
        if not high - low <= 2 * WIDE_INTERVAL * measurement.p50_ms:
            notes.append(f"the interval of p50 is wider than ±{WIDE_INTERVAL:.0%}: the machine is noisy")
    if load is not None and load > BUSY_SHARE * host.usable_cores():
        notes.append(f"the machine was busy before the measurement began (load average {load:.1f})")
    for part in samples:
        if part.preemptions > PREEMPTED_SHARE * sum(len(other.ms) for other in samples):
            notes.append(f"other processes took the core away {part.preemptions} times while measuring")
            break
    if (governor := host.governor()) not in ("", "performance"):
        notes.append(f"the frequency governor is {governor!r}, not 'performance'")
    return tuple(notes)


class _Looks:
    """Samples collected over several looks, each in a fresh process and as long as all before it."""

    def __init__(
        self, subjects: Sequence[Subject], inputs: Mapping[str, Any], settings: Settings, say: Callable[[str], None]
    ) -> None:
        self.subjects, self.inputs, self.settings, self.say = subjects, inputs, settings, say
        self.samples: tuple[Samples, ...] = ()

    def more(self, look: int) -> Measurement:
        """Take further samples and summarize all of them."""
        names = " and ".join(str(subject.path) for subject in self.subjects)
        self.say(f"measuring {names}" if look == 0 else "too close to tell: measuring again, longer")
        factor = 2 ** max(0, look - 1)
        longer = replace(
            self.settings,
            blocks=self.settings.blocks * factor,
            min_runs=self.settings.min_runs * factor,
            max_seconds=self.settings.max_seconds * factor,
            memory=self.settings.memory and look == 0,
            seed=self.settings.seed + look,
        )
        taken = measure(self.subjects, settings=longer, **self.inputs)
        earlier = [[part] for part in self.samples] or [[] for _ in taken]
        self.samples = tuple(stats.join([*parts, now]) for parts, now in zip(earlier, taken, strict=True))
        baseline = self.samples[1] if len(self.samples) > 1 else None
        return stats.summarize(self.samples[0], target=self.inputs["target"].name, baseline=baseline)
