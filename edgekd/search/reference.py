"""What search measures before it chooses: small models of the family and the teacher, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.arch import Arch
from edgekd.errors import RecipeError, StageError
from edgekd.export.onnx import OPSET
from edgekd.files import sha256_json, write_json
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import Samples
from edgekd.latency.table import Conditions, LatencyTable, fit
from edgekd.search.points import build_graph, convolution_points, encoder_points
from edgekd.surgery import Importance

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.search import Search
    from edgekd.student import Student


@dataclass(frozen=True)
class Reference:
    """What was measured before the search: the table, the teacher's median, and p95 over p50 of small models."""

    table: LatencyTable
    teacher_ms: float
    tail: float


def measure_reference(settings: Search, student: Student, importance: Importance, ctx: Context) -> Reference:
    """Measure small models of the family beside the teacher, or take what an earlier round or `table` measured."""
    key = sha256_json(
        {
            "arch": student.arch.to_dict(),
            "target": ctx.target.fingerprint,
            "shape": [ctx.budget.batch, ctx.budget.sequence, ctx.budget.threads],
            "lowering": ctx.lowering,
            "opset": OPSET,
        }
    )
    file = Path(settings.table) if settings.table else ctx.cache / f"latency-{key[:16]}.json"
    if file.is_file():
        return read_reference(file)
    if settings.table:
        raise RecipeError(f"there is no latency table at {settings.table!r}; leave `table` out to measure one")
    points = _points(student)
    reference = _measure_points(points, student, importance, ctx)
    ctx.cache.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        {"table": reference.table.to_dict(), "teacher_ms": reference.teacher_ms, "tail": reference.tail},
    )
    return reference


def _points(student: Student) -> list[Arch]:
    if student.arch.layers[0].heads:
        return encoder_points(student.arch)
    return convolution_points(student.arch, droppable_layers(student))


def _measure_points(points: list[Arch], student: Student, importance: Importance, ctx: Context) -> Reference:
    if ctx.teacher_graph is None:
        raise StageError("search needs the teacher's ONNX graph to compare with")
    ctx.progress.start("latency table: build models", len(points))
    subjects = [Subject(name="teacher", path=ctx.teacher_graph)]
    for i, arch in enumerate(points):
        subjects.append(Subject(name=str(i), path=build_graph(student, arch, importance, ctx, ctx.work / f"p{i}.onnx")))
        ctx.progress.advance()
    ctx.progress.stop()
    samples = time_graphs(subjects, ctx, blocks=40)
    medians = [float(np.median(s.ms)) for s in samples]
    tails = [float(np.percentile(s.ms, 95) / np.median(s.ms)) for s in samples[1:]]
    conditions = Conditions(
        target=ctx.target.name,
        batch=ctx.budget.batch,
        sequence=samples[0].sequence,
        threads=samples[0].threads,
        precision=ctx.lowering,
    )
    by_source = not student.arch.layers[0].heads
    table = fit(list(zip(points, medians[1:], strict=True)), conditions=conditions, by_source=by_source)
    for subject in subjects[1:]:
        subject.path.unlink()
    return Reference(table, medians[0], float(np.median(tails)))


def read_reference(file: Path) -> Reference:
    """Read what `measure_reference` wrote.

    Raises:
        RecipeError: it is something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return Reference(LatencyTable.from_dict(data["table"]), float(data["teacher_ms"]), float(data["tail"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file} is not a latency table of the search stage: {error}") from None


def time_graphs(subjects: Sequence[Subject], ctx: Context, blocks: int) -> list[Samples]:
    """Measure graphs side by side on the target, as the budget says."""
    budget = ctx.budget
    return measure(
        subjects,
        target=ctx.target,
        batch=budget.batch,
        sequence=budget.sequence,
        threads=budget.threads,
        settings=Settings(blocks=blocks, seed=ctx.seed),
    )


def droppable_layers(student: Student) -> list[bool]:
    """Which layers may be left out."""
    family, model = student.family, student.model
    return [family.droppable(model, i) for i in range(len(student.arch.layers))]
