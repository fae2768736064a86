"""One form of a student, built and scored, and built again with layers in float where it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import StageError
from edgekd.export.blame import explain
from edgekd.export.lower import NOT_FROM_ONNX, Ranges, precision_of
from edgekd.export.matmul_nbits import packable
from edgekd.export.names import multiplied
from edgekd.export.nbits import WEIGHT_ONLY, grid_of_form
from edgekd.export.onnx import export_float
from edgekd.export.parity import Logits, require_parity
from edgekd.quantize.forms import (
    find_ranges,
    form_logits,
    metric_of,
    needs_examples,
    sample,
    weights_of_form,
    write_form,
    write_tflite,
)
from edgekd.quantize.linear import copied, take_back
from edgekd.quantize.prepare import Sources
from edgekd.quantize.sensitivity import EXAMPLES, fewest, rank, units
from edgekd.student import Student


@dataclass(frozen=True)
class Built:
    """A form with the student it was made from, its ranges (None: it keeps none), its logits and its score.

    `problem`: why it cannot ship as it is.
    """

    form: str
    student: Student
    graph: Path
    file: Path
    ranges: Ranges | None
    logits: Logits
    metric: float
    problem: str = ""

    def is_good(self, floor: float) -> bool:
        """Whether it may ship and its metric is at least this."""
        return not self.problem and self.metric >= floor

    @property
    def has_layers(self) -> bool:
        """Whether layers of it can stay float; those of `int16_qdq` have the widest activations its targets know."""
        return self.form not in (*NOT_FROM_ONNX, "int16_qdq") and precision_of(self.form) in ("int8", "int4")


def build_form(form: str, sources: Sources, reference: Logits) -> Built:
    """Write one form of its source and score it on validation.

    Raises:
        DataError, ModelError, RecipeError: as making it raises them.
        StageError: it says something else than the float model, and leaving layers in float could not help.
    """
    ctx, settings, source = sources.ctx, sources.settings, sources.of(form)
    if form in NOT_FROM_ONNX:
        return _build_tflite(form, source.student, sources, reference)
    ranges = None
    examples = sample(ctx.train, settings.calibration, seed=ctx.seed) if needs_examples(form) else None
    if examples is not None:
        ranges = find_ranges(source.graph, form, examples, observer=settings.observer)
    file = ctx.work / f"{form}.onnx"
    write_form(source.student, source.graph, form, file, target=ctx.target, budget=ctx.budget, ranges=ranges)
    made = Built(form, source.student, source.graph, file, ranges, form_logits(file, ctx.validation), 0.0)
    why = explain(source.graph, file, ctx.validation, precision_of(form))
    return _judged(made, sources, reference, strict=not (settings.fallback and made.has_layers), why=why)


def _build_tflite(form: str, student: Student, sources: Sources, reference: Logits) -> Built:
    """The same for the form that is not made from ONNX; the student remembers how wide its activations are."""
    ctx, told = sources.ctx, dict[str, Any]()
    examples = sample(ctx.train, sources.settings.calibration, seed=ctx.seed)
    wide = (student.quantization or {}).get("wide")
    file = ctx.work / f"{form}{'-wide' if wide else ''}.tflite"
    write_tflite(student, ctx.task, file, examples, ctx.budget, told)
    own = replace(student, quantization={**(student.quantization or {}), **told})
    made = Built(form, own, sources.graph, file, None, form_logits(file, ctx.validation), 0.0)
    return _judged(made, sources, reference, strict=wide is not None or not sources.settings.fallback)


def widened(built: Built, sources: Sources, reference: Logits) -> Built | None:
    """The same TFLite form with norms that have activations of 16 bits, if its metric is better."""
    ctx, own = sources.ctx, built.student.quantization or {}
    if own.get("wide", True):
        return None
    ctx.progress.say(f"quantize: {built.form} misses the tolerance; trying norms with activations of 16 bits")
    student = replace(built.student, quantization={**own, "wide": True})
    try:
        other = _build_tflite(built.form, student, sources, reference)
    except StageError as error:
        ctx.progress.say(f"quantize: {error}")
        return None
    return other if built.problem or other.metric > built.metric else None


def _judged(
    built: Built, sources: Sources, reference: Logits, *, strict: bool, why: Callable[[], str] | None = None
) -> Built:
    """With its score, and what is wrong with it; if `strict`, that is raised."""
    ctx, problem = sources.ctx, ""
    try:
        require_parity(reference, built.logits, precision_of(built.form), built.form, why)
    except StageError as error:
        if strict or not np.isfinite(built.logits).all():
            raise
        problem = str(error)
    return replace(built, metric=metric_of(built.logits, ctx), problem=problem)


def rescue(built: Built, sources: Sources, reference: Logits, floor: float) -> Built | None:
    """The same form with the fewest of the worst layers in float, if that lifts its metric over the floor.

    The sensitivity of all layers goes into the notes.
    """
    ctx = sources.ctx
    own = tuple((built.student.quantization or {}).get("keep_float", ()))
    parts = [unit for unit in units(_layers(built)) if not set(unit) & set(own)]
    ctx.progress.say(f"quantize: {built.form} misses the tolerance; trying its {len(parts)} layers one by one")
    few = ctx.validation.take(np.arange(min(EXAMPLES, len(ctx.validation)), dtype=np.int64))

    def build(kept: Sequence[str]) -> Path:
        return _write(built, [*own, *kept], ctx.work / "tried.onnx", sources)

    ranked = rank(parts, build, lambda file: form_logits(file, few), reference[: len(few)])
    told = {"lowering": built.form}
    ctx.notes.setdefault("sensitivity", []).extend({**told, **each.to_dict()} for each in ranked)
    best: list[Built] = []

    def good(kept: Sequence[str]) -> bool:
        logits = form_logits(build(kept), ctx.validation)
        best[:] = [_judged(replace(built, logits=logits, problem=""), sources, reference, strict=False)]
        return best[0].is_good(floor)

    kept = fewest(ranked, good)
    if kept is None:
        ctx.progress.say(f"quantize: {built.form} misses it even with half of its layers in float")
        return None
    return _restored(best[0], [*own, *kept], sources, reference, floor)


def _layers(built: Built) -> dict[str, Any]:
    """The layers of a form that rounding may hurt, by module with their nodes."""
    import onnx

    graph = onnx.load(built.graph, load_external_data=False)
    if built.form not in WEIGHT_ONLY:
        return multiplied(graph)
    grid, _ = grid_of_form(built.form, weights_of_form(built.student, built.form))
    return packable(graph, grid)


def _restored(built: Built, kept: Sequence[str], sources: Sources, reference: Logits, floor: float) -> Built:
    """The form with these modules in float; what was done to them beforehand, for the rounding, is undone.

    Should that make it worse than `floor`, they stay as the form was judged.
    """
    ctx, original = sources.ctx, sources.smoothed
    student = _with_float(built.student, built.form, kept)
    output = ctx.work / f"{built.form}_part.onnx"
    if student.model is not original.model:
        undone = copied(student)
        take_back(undone.model, original.model, kept)
        graph = export_float(undone, ctx.task.name, ctx.work / f"{built.form}_part-source.onnx")
        other = replace(built, student=undone, graph=graph, file=output)
        _write(other, kept, output, sources)
        other = _judged(
            replace(other, logits=form_logits(output, ctx.validation), problem=""), sources, reference, strict=False
        )
        if other.is_good(floor):
            return other
    return replace(built, student=student, file=_write(built, kept, output, sources))


def _write(built: Built, kept: Sequence[str], output: Path, sources: Sources) -> Path:
    ctx, student = sources.ctx, _with_float(built.student, built.form, kept)
    return write_form(
        student, built.graph, built.form, output, target=ctx.target, budget=ctx.budget, ranges=built.ranges
    )


def _with_float(student: Student, form: str, kept: Sequence[str]) -> Student:
    return replace(
        student, quantization={**(student.quantization or {}), "lowering": form, "keep_float": sorted(set(kept))}
    )
