"""What is known of an artifact's latency: measured, a vendor's estimate, or nothing, and the verdict on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekd.context import Budget
from edgekd.devices import Estimate, is_estimated, unavailable
from edgekd.errors import EdgekdError
from edgekd.latency import stats
from edgekd.latency.artifact import Artifact as Model
from edgekd.latency.bench import Settings
from edgekd.latency.estimate import estimate
from edgekd.latency.stats import Measurement, Samples, join, summarize
from edgekd.latency.verdict import Verdict, decide, judge
from edgekd.pipeline.artifact import Artifact, float_forms, timed
from edgekd.student import Student
from edgekd.target import Target

SAME_FORM = "the teacher was compiled in the same form ({form}): both latencies are estimates of one compiler"


@dataclass(frozen=True, kw_only=True)
class Gauged:
    """A measurement with its verdict; `estimates` of `model` (and `baseline`) where a vendor's compiler made them."""

    measurement: Measurement
    verdict: Verdict
    estimates: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher to compare with: its float32 graph, and how to write it in the artifact's own form."""

    graph: Path
    in_form: Callable[[], Path]


def gauge(
    artifact: Artifact, target: Target, budget: Budget, folder: Path, *, teacher: Teacher | None, look: Settings
) -> Gauged:
    """Find the latency of an artifact on its target as well as it can be known from here.

    Measured targets: in turns with the teacher's float32 graph until the verdict is clear (bounded). Estimated ones:
    compiled into `folder`, the teacher in the same form for the ratio. Others: no figure, and the reason.

    Raises:
        ModelError, TargetError: as measuring and compiling raise them.
    """
    if reason := unavailable(target):
        return _unknown(target, budget, reason)
    if is_estimated(target):
        return _estimated(artifact, target, budget, folder, teacher)
    return _measured(artifact, target, budget, teacher, look)


def shipping_forms(student: Student, target: Target) -> tuple[str, ...]:
    """The forms in which a student may ship, of which the fastest does; one where none can be measured.

    A quantized student has its own. Another takes a float form of the target, or the target's first if it has none.
    """
    if student.quantization is not None:
        return (str(student.quantization["lowering"]),)
    forms = float_forms(target)
    if len(forms) < 2 or unavailable(target) or is_estimated(target):
        return tuple([form for form in target.forms if form in forms] or target.forms)[:1]
    return forms


def _unknown(target: Target, budget: Budget, reason: str) -> Gauged:
    measurement = stats.unavailable(target.name, reason, batch=budget.batch, sequence=budget.sequence)
    verdict = judge(measurement, latency_p95_ms=budget.latency_p95_ms, speedup=budget.speedup)
    if not budget.asks_latency:
        verdict = replace(verdict, reason=f"latency not measured ({reason}), and no latency budget was given")
    return Gauged(measurement=measurement, verdict=verdict)


def _estimated(artifact: Artifact, target: Target, budget: Budget, folder: Path, teacher: Teacher | None) -> Gauged:
    measurement, estimates, note = _compiled(artifact, target, folder, teacher)
    measurement = replace(
        measurement,
        batch=budget.batch,
        sequence=artifact.shapes.get("sequence"),
        throughput=1000.0 * budget.batch / estimates["model"].ms,
        notes=(*measurement.notes, *([note] if note else [])),
    )
    verdict = judge(measurement, latency_p95_ms=budget.latency_p95_ms, speedup=budget.speedup)
    return Gauged(measurement=measurement, verdict=verdict, estimates=estimates)


def _compiled(
    artifact: Artifact, target: Target, folder: Path, teacher: Teacher | None
) -> tuple[Measurement, Mapping[str, Estimate], str]:
    """The compiler's word on the artifact and, if it takes that too, on the teacher in the same form; a note on it."""
    measurement, estimates = estimate(target, {"model": Model(artifact.file)}, folder)
    if teacher is None:
        return measurement, estimates, ""
    try:
        _, theirs = estimate(target, {"model": Model(teacher.in_form())}, folder / "baseline")
    except EdgekdError as error:
        # A teacher that does not compile is no reason to lose the artifact.
        return measurement, estimates, f"no speedup is known: the teacher as {artifact.lowering}: {error}"
    baseline = theirs["model"]
    measurement = replace(measurement, teacher_p50_ms=baseline.ms, speedup=baseline.ms / estimates["model"].ms)
    return measurement, {**estimates, "baseline": baseline}, SAME_FORM.format(form=artifact.lowering)


def _measured(artifact: Artifact, target: Target, budget: Budget, teacher: Teacher | None, look: Settings) -> Gauged:
    if teacher is None:
        measurement = summarize(timed([artifact.file], target, budget)[0], target=target.name)
        verdict = judge(measurement, latency_p95_ms=budget.latency_p95_ms, speedup=budget.speedup)
        return Gauged(measurement=measurement, verdict=verdict)
    graph, looks = teacher.graph, list[tuple[Samples, Samples]]()

    def more(number: int) -> Measurement:
        settings = replace(look, blocks=look.blocks * 2 ** max(number - 1, 0), memory=number == 0, seed=number)
        of_teacher, own = timed([graph, artifact.file], target, budget, settings)
        looks.append((of_teacher, own))
        return summarize(join([own for _, own in looks]), target=target.name, baseline=join([t for t, _ in looks]))

    measurement, verdict = decide(more, latency_p95_ms=budget.latency_p95_ms, speedup=budget.speedup)
    return Gauged(measurement=measurement, verdict=verdict)
