"""Quantize: build the forms, score them on validation, measure them, keep the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.devices import is_estimated, unavailable
from edgekd.errors import EdgekdError, StageError
from edgekd.export.lower import NOT_FROM_ONNX
from edgekd.export.onnx import export_float
from edgekd.export.parity import Logits, onnx_logits
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.quantize.build import Built, build_form, rescue, widened
from edgekd.quantize.forms import metric_of, needs_examples
from edgekd.quantize.prepare import Sources, require_float, say_what_is_not_fitted, wanted_forms
from edgekd.quantize.tuning import FORMS as TUNED_FORMS
from edgekd.student import Student

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.quantize import Quantize


@dataclass(frozen=True)
class Candidate:
    """One form: its file, its metric on validation, its median latency in ms (None: not measured), what stays float."""

    lowering: str
    file: Path
    metric: float
    p50_ms: float | None = None
    keep_float: tuple[str, ...] = ()

    @property
    def size_mb(self) -> float:
        """10^6 bytes of the file."""
        return self.file.stat().st_size / 1e6

    def to_dict(self) -> dict[str, Any]:
        """For the ledger."""
        kept = {"keep_float": list(self.keep_float)} if self.keep_float else {}
        size = self.file.stat().st_size
        return {"lowering": self.lowering, "metric": self.metric, "p50_ms": self.p50_ms, "size_bytes": size, **kept}


def quantize(settings: Quantize, student: Student, ctx: Context) -> Student:
    """See `Quantize`.

    Raises:
        DataError: no training example to calibrate on, or one with values that are not finite.
        ModelError: the model is quantized already, or a form has operators that the target does not run.
        RecipeError: settings that do not go together.
        TargetError: the target runs no such form.
    """
    settings.require_together()
    student = require_float(settings, student)
    wanted = wanted_forms(settings, ctx)
    say_what_is_not_fitted(settings, student, ctx)
    graph = export_float(student, ctx.task.name, ctx.work / "float.onnx")
    reference = onnx_logits(graph, ctx.validation)
    float_metric = metric_of(reference, ctx)
    trained = _trained(settings, student, ctx)
    sources = Sources(settings, student, trained, graph, ctx, float_metric)
    if settings.tune:
        wanted = _without_other_bits(wanted, sources)
    built = _built(wanted, sources, reference)
    measurable = _not_measured(ctx) is None
    if settings.fallback and not settings.learns_few_bits:
        built = _rescued(built, sources, reference, measurable)
    return _best(_whole(built, ctx), sources, measurable)


def _trained(settings: Quantize, student: Student, ctx: Context) -> Student:
    if not settings.epochs:
        return student
    from edgekd.quantize.qat import train_quantized

    return train_quantized(settings, student, ctx)


def _without_other_bits(wanted: Sequence[str], sources: Sources) -> tuple[str, ...]:
    """Of the forms with quantized weights alone, only the one whose bits neural-compressor chose."""
    weights = sources.tuned[1]
    sources.ctx.notes["tuned"] = weights
    form = TUNED_FORMS[weights["bits"]]
    left = tuple(each for each in wanted if each == form or each not in TUNED_FORMS.values())
    return left or (form,)


def _built(wanted: Sequence[str], sources: Sources, reference: Logits) -> list[Built]:
    """All forms that can be made; one that cannot is noted, unless there is no other."""
    built, refused, ctx = [], {}, sources.ctx
    for form in wanted:
        try:
            built.append(build_form(form, sources, reference))
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


def _rescued(built: Sequence[Built], sources: Sources, reference: Logits, measurable: bool) -> list[Built]:
    """The forms that miss the tolerance, with some layers in float: only those that might then be chosen."""
    ctx, floor = sources.ctx, sources.float_metric - sources.settings.tolerance
    good = [each for each in built if each.is_good(floor)]
    bad = [each for each in built if not each.is_good(floor)]
    if good and bad and measurable:
        times = {c.lowering: c.p50_ms or 0.0 for c in _timed([_candidate(each) for each in built], ctx)}
        fastest = min(times[each.form] for each in good)
        bad = [each for each in bad if times[each.form] < fastest]
    elif good:
        bad = [each for each in bad if built.index(each) < built.index(good[0])]
    better = {each.form: rescue(each, sources, reference, floor) for each in bad if each.has_layers}
    better |= {each.form: widened(each, sources, reference) for each in bad if each.form in NOT_FROM_ONNX}
    return [better.get(each.form) or each for each in built]


def _whole(built: Sequence[Built], ctx: Context) -> list[Built]:
    """Those that say what the float model says.

    Raises:
        StageError: none does.
    """
    whole = [each for each in built if not each.problem]
    problems = {each.form: each.problem for each in built if each.problem}
    if problems:
        ctx.notes["refused"] = {**ctx.notes.get("refused", {}), **problems}
    if not whole:
        raise StageError("none of the forms came out right: " + "; ".join(problems.values()))
    return whole


def _best(built: Sequence[Built], sources: Sources, measurable: bool) -> Student:
    """The student as the chosen form wants it, with the choice in its `quantization` and in the notes."""
    ctx, settings = sources.ctx, sources.settings
    found = [_candidate(each) for each in built]
    if len(found) > 1 and measurable:
        found = _timed(found, ctx)
    chosen = choose(found, sources.float_metric, settings.tolerance, size_mb=ctx.budget.size_mb)
    ctx.notes["float_metric"] = sources.float_metric
    ctx.notes["candidates"] = [candidate.to_dict() for candidate in found]
    ctx.notes["chosen"] = chosen.lowering
    if len(found) > 1 and not measurable:
        ctx.notes["not_measured"] = f"chosen by the target's preference, not by time: {_not_measured(ctx)}"
    won = built[found.index(chosen)]
    kept: dict[str, Any] = {**(won.student.quantization or {}), "lowering": chosen.lowering}
    if won.ranges is not None:
        kept["ranges"] = {name: list(pair) for name, pair in won.ranges.items()}
    if needs_examples(chosen.lowering):
        kept |= {"calibration": settings.calibration, "seed": ctx.seed, "observer": settings.observer}
    return replace(won.student, quantization=kept)


def _not_measured(ctx: Context) -> str | None:
    """Why nothing is measured, if so."""
    return unavailable(ctx.target) or ("its latency is the vendor's estimate" if is_estimated(ctx.target) else None)


def choose(
    found: Sequence[Candidate], float_metric: float, tolerance: float, *, size_mb: float | None = None
) -> Candidate:
    """The fastest form within `tolerance` of the float metric; if none is, the one with the best metric.

    Where nothing was measured, the first of those within the tolerance. With a limit of size, those that keep it.
    """
    good = [c for c in found if c.metric >= float_metric - tolerance]
    good = [c for c in good if size_mb is None or c.size_mb <= size_mb] or good
    if good and all(c.p50_ms is None for c in good):
        return good[0]
    if good:
        return min(good, key=lambda c: (c.p50_ms or 0.0, -c.metric))
    return max(found, key=lambda c: (c.metric, -(c.p50_ms or 0.0)))


def _candidate(built: Built) -> Candidate:
    kept = tuple((built.student.quantization or {}).get("keep_float", ()))
    return Candidate(built.form, built.file, built.metric, keep_float=kept)


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
