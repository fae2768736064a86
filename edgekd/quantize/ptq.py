"""Post-training quantization: build the forms, score them on validation, measure them, keep the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.devices import is_estimated, unavailable
from edgekd.errors import DataError, EdgekdError, StageError, TargetError
from edgekd.export.lower import NOT_FROM_ONNX, Ranges, precision_of
from edgekd.export.onnx import export_float
from edgekd.export.parity import Logits, onnx_logits, require_parity
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.quantize import candidates
from edgekd.quantize.forms import find_ranges, form_logits, needs_examples, sample, write_form, write_tflite
from edgekd.student import Student

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.quantize import Quantize


@dataclass(frozen=True)
class Candidate:
    """One form: its file, its metric on validation and its median latency in ms (None if not measured)."""

    lowering: str
    file: Path
    metric: float
    p50_ms: float | None = None


def quantize(settings: Quantize, student: Student, ctx: Context) -> Student:
    """See `Quantize`.

    Raises:
        DataError: no training example to calibrate on.
        TargetError: the target runs no such form.
        ModelError: a form has operators that the target does not run.
    """
    wanted = candidates(settings.lowering, ctx.target)
    if not wanted:
        raise TargetError(
            f"target {ctx.target.name} runs none of the forms of quantize.lowering: {settings.lowering}; "
            f"choose auto or one of: {', '.join(ctx.target.forms)}"
        )
    graph = export_float(student, ctx.task.name, ctx.work / "float.onnx")
    reference = onnx_logits(graph, ctx.validation)
    float_metric = _metric(reference, ctx)
    built = _built(graph, wanted, settings, reference, student, ctx)
    found = [candidate for candidate, _ in built]
    reason = unavailable(ctx.target) or ("its latency is the vendor's estimate" if is_estimated(ctx.target) else None)
    if len(found) > 1 and reason is None:
        found = _timed(found, ctx)
    chosen = choose(found, float_metric, settings.tolerance)
    ctx.notes["float_metric"] = float_metric
    ctx.notes["candidates"] = [
        {"lowering": c.lowering, "metric": c.metric, "p50_ms": c.p50_ms, "size_bytes": c.file.stat().st_size}
        for c in found
    ]
    ctx.notes["chosen"] = chosen.lowering
    if len(found) > 1 and reason is not None:
        ctx.notes["not_measured"] = f"chosen by the target's preference, not by time: {reason}"
    kept: dict[str, Any] = {"lowering": chosen.lowering}
    ranges = built[found.index(chosen)][1]
    if ranges is not None:
        kept["ranges"] = {name: list(pair) for name, pair in ranges.items()}
    elif needs_examples(chosen.lowering):
        kept |= {"calibration": settings.calibration, "seed": ctx.seed}
    return replace(student, quantization=kept)


def _built(
    graph: Path, wanted: Sequence[str], settings: Quantize, reference: Logits, student: Student, ctx: Context
) -> list[tuple[Candidate, Ranges | None]]:
    """All forms that come out right; one that does not is noted, unless there is no other."""
    built, refused = [], {}
    for form in wanted:
        try:
            built.append(_build(graph, form, settings, reference, student, ctx))
        except EdgekdError as error:
            if len(wanted) == 1:
                raise
            refused[form] = str(error)
            ctx.progress.say(f"quantize: {form} is left out: {error}")
    if not built:
        raise StageError("none of the forms came out right: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))
    if refused:
        ctx.notes["refused"] = refused
    return built


def choose(found: Sequence[Candidate], float_metric: float, tolerance: float) -> Candidate:
    """The fastest form within `tolerance` of the float metric; if none is, the one with the best metric.

    Where nothing was measured, the first of those within the tolerance.
    """
    good = [c for c in found if c.metric >= float_metric - tolerance]
    if good and all(c.p50_ms is None for c in good):
        return good[0]
    if good:
        return min(good, key=lambda c: (c.p50_ms or 0.0, -c.metric))
    return max(found, key=lambda c: (c.metric, -(c.p50_ms or 0.0)))


def _build(
    graph: Path, form: str, settings: Quantize, reference: Logits, student: Student, ctx: Context
) -> tuple[Candidate, Ranges | None]:
    """One form with its metric, and the ranges it was made with (None: it has none, or keeps them to itself)."""
    ranges = None
    examples = sample(ctx.train, settings.calibration, seed=ctx.seed) if needs_examples(form) else None
    if form in NOT_FROM_ONNX and examples is not None:
        file = write_tflite(student, ctx.task, ctx.work / f"{form}.tflite", examples, ctx.budget)
    else:
        ranges = None if examples is None else find_ranges(graph, form, examples)
        file = ctx.work / f"{form}.onnx"
        write_form(student, graph, form, file, target=ctx.target, budget=ctx.budget, ranges=ranges)
    logits = form_logits(file, ctx.validation)
    require_parity(reference, logits, precision_of(form), form)
    return Candidate(form, file, _metric(logits, ctx)), ranges


def _metric(logits: Logits, ctx: Context) -> float:
    labels = ctx.validation.labels
    if labels is None:
        raise DataError("the validation split has no labels and was not labelled by the teacher")
    return ctx.task.score(logits, labels)


def _timed(found: Sequence[Candidate], ctx: Context) -> list[Candidate]:
    """The candidates with their median latency, measured interleaved in one run."""
    subjects = [Subject(name=c.lowering, path=c.file) for c in found]
    samples = measure(
        subjects,
        target=ctx.target,
        batch=ctx.budget.batch,
        sequence=ctx.budget.sequence,
        threads=ctx.budget.threads,
        settings=Settings(blocks=60, seed=ctx.seed),
    )
    medians: Mapping[str, float] = {s.name: float(np.median(s.ms)) for s in samples}
    return [replace(c, p50_ms=medians[c.lowering]) for c in found]
