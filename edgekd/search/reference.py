"""What search knows of latency before it chooses: a table to predict with, and the teacher's own time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd import host
from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body, body_of_student
from edgekd.calibrate.estimates import Estimator
from edgekd.calibrate.graphs import build_graphs
from edgekd.calibrate.run import fingerprint, runtime_of
from edgekd.calibrate.shapes import convolution_shapes, short_chains
from edgekd.devices import is_estimated, unavailable, usual_threads
from edgekd.errors import ModelError, RecipeError, StageError, TargetError
from edgekd.export.onnx import OPSET
from edgekd.files import sha256_file, sha256_json, write_json
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.cell import Frame
from edgekd.latency.fit import fit
from edgekd.latency.stats import Samples
from edgekd.latency.table import Conditions, LatencyTable, find_table, frame_of, load

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.search import Search
    from edgekd.student import Student

DEFAULT_TAIL = 1.0
"""p95 over p50 of a device that is not timed: its estimates have one figure."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A table, the frame to predict in, the teacher's latency, and p95 over p50 of small models.

    `scale` is what was measured now over what the table predicts: a table may be from another day.
    """

    table: LatencyTable
    frame: Frame
    teacher_ms: float
    tail: float = DEFAULT_TAIL
    scale: float = 1.0
    source: str = "measured for this search"

    def predictor(self) -> Predictor:
        """Latencies in milliseconds of shapes, quickly."""
        return Predictor(self)


class Predictor:
    """Predicts one shape or a population; the cells are looked up once."""

    def __init__(self, reference: Reference) -> None:
        self.mix, self.scale = reference.table.mix(reference.frame), reference.scale

    def __call__(self, arch: Arch) -> float:
        """Milliseconds of one shape."""
        return self.scale * float(self.mix.predict([arch])[0])


def find_reference(settings: Search, student: Student, ctx: Context) -> Reference:
    """A reference from `table`, from the target's own table in `profiles/`, or measured (or estimated) for this search.

    A table holds for this search if it was made for this target, on this CPU with this runtime and as many threads,
    and covers the teacher's family and width at the budget's batch and length.

    Raises:
        TargetError: the target can be neither measured nor estimated here and no table covers it.
        RecipeError: the table that the recipe names is not there or does not cover the student.
    """
    body = body_of_student(student, ctx.task.name)
    frame = _frame(body, ctx)
    path = _table_path(settings, ctx)
    key = {
        "cpu": host.cpu_name(), "runtime": runtime_of(ctx.target), "contents": sha256_file(path) if path else "",
        "arch": student.arch.to_dict(), "target": ctx.target.fingerprint, "lowering": ctx.lowering, "opset": OPSET,
        "shape": [ctx.budget.batch, ctx.budget.sequence, ctx.budget.threads],
    }  # fmt: skip
    file = ctx.cache / f"latency-{sha256_json(key)[:16]}.json"
    if file.is_file():
        return read_reference(file)
    reference = (path and _from_table(path, settings, body, frame, ctx)) or _own(body, frame, ctx)
    ctx.cache.mkdir(parents=True, exist_ok=True)
    facts = {**vars(reference), "table": reference.table.to_dict(), "frame": vars(frame)}
    write_json(file, facts)
    return reference


def read_reference(file: Path) -> Reference:
    """Read what `find_reference` wrote.

    Raises:
        RecipeError: it is something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        table, frame = LatencyTable.from_dict(data.pop("table")), Frame(**data.pop("frame"))
        return Reference(table=table, frame=frame, **data)
    except (ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
        raise RecipeError(f"{file} is not what search wrote there: {error}; delete it") from None


def _frame(body: Body, ctx: Context) -> Frame:
    tokens = ctx.budget.sequence if body.image is None else body.tokens
    return frame_of(body.student.arch, ctx.lowering, ctx.budget.batch, tokens, body.outline)


def _table_path(settings: Search, ctx: Context) -> Path | None:
    if settings.table is None:
        return find_table(ctx.target.name)
    if not Path(settings.table).is_file():
        raise RecipeError(f"there is no latency table at {settings.table!r}; leave `table` out to measure one")
    return Path(settings.table)


def _from_table(path: Path, settings: Search, body: Body, frame: Frame, ctx: Context) -> Reference | None:
    """A reference from a table that was made before, brought to the speed of now by three models where possible."""
    table = load(path)
    if reason := _foreign(table, frame, ctx):
        if settings.table:
            raise RecipeError(f"the latency table {path} does not hold here: {reason}")
        return None
    ctx.progress.say(f"search: latencies from {path.name}")
    mix, arch = table.mix(frame), body.student.arch
    if unavailable(ctx.target) is not None:
        teacher = _predicted_teacher(table, frame, arch, ctx)
        return Reference(table=table, frame=frame, teacher_ms=teacher, source=f"{path.name}, nothing was run")
    if is_estimated(ctx.target):
        with Estimator(ctx.target, ctx.work) as estimate:
            teacher = estimate(body, arch, frame).ms
        return Reference(table=table, frame=frame, teacher_ms=teacher, source=path.name)
    shapes = short_chains(arch) if arch.layers[0].heads else convolution_shapes(arch, droppable_layers(body.student))
    few = [shapes[0], shapes[len(shapes) // 2], shapes[-1]]
    medians, teacher_ms, tail = _timed(few, body, frame, ctx)
    scale = float(np.median(np.asarray(medians) / mix.predict(few)))
    return Reference(table=table, frame=frame, teacher_ms=teacher_ms, tail=tail, scale=scale, source=path.name)


def _predicted_teacher(table: LatencyTable, frame: Frame, arch: Arch, ctx: Context) -> float:
    """The teacher in the form a speedup is over: fp32 where latencies are measured, else the student's own.

    Raises:
        RecipeError: a speedup is asked, and the table has no fp32 models.
    """
    if table.conditions.kind != "measured":
        return float(table.mix(frame).predict([arch])[0])
    for lowering in ("fp32", "fp32_fused"):
        if table.covers(plain := replace(frame, lowering=lowering)):
            return float(table.mix(plain).predict([arch])[0])
    if ctx.budget.speedup is not None:
        raise RecipeError(f"a speedup is over the fp32 teacher, and the latency table of {ctx.target.name} has no fp32 "
                          "models: calibrate with --lowering fp32 too, or give latency_p95_ms")  # fmt: skip
    return float(table.mix(frame).predict([arch])[0])


def _foreign(table: LatencyTable, frame: Frame, ctx: Context) -> str:
    """Why a table does not hold for this search, or an empty string."""
    own, here = table.conditions, unavailable(ctx.target) is None
    if own.target != ctx.target.name:
        return f"it was made for {own.target}"
    if own.fingerprint and own.fingerprint != fingerprint(ctx.target):
        return "the target's runtime or options were others"
    if own.kind == "measured" and here:
        threads = ctx.budget.threads or usual_threads(ctx.target)
        if own.threads != threads:
            return f"it was made with {own.threads} threads, not {threads}"
        if own.cpu and own.cpu != host.cpu_name():
            return f"it was made on {own.cpu}"
        if own.runtime and own.runtime != runtime_of(ctx.target):
            return f"it was made with {own.runtime}, not {runtime_of(ctx.target)}"
    return "" if table.covers(frame) else f"it does not cover {frame.describe()}"


def _own(body: Body, frame: Frame, ctx: Context) -> Reference:
    """A table of this teacher alone: about ten shapes, timed beside the teacher or compiled."""
    if reason := unavailable(ctx.target):
        raise TargetError(
            f"search needs latencies, and {ctx.target.name} is unavailable: {reason}. Give a table made where it is "
            "there (`edgekd calibrate`, stages.search.table), or leave search out and give prune its layers, heads "
            "and neurons"
        )
    arch = body.student.arch
    shapes = short_chains(arch) if arch.layers[0].heads else convolution_shapes(arch, droppable_layers(body.student))
    if is_estimated(ctx.target):
        medians, teacher_ms, tail = _estimated(shapes, body, frame, ctx)
    else:
        medians, teacher_ms, tail = _timed(shapes, body, frame, ctx)
    cell = fit(shapes, medians, frame, by_source=bool(frame.outline))
    kind = "vendor_estimate" if is_estimated(ctx.target) else "measured"
    table = LatencyTable(conditions=Conditions(target=ctx.target.name, kind=kind), cells=(cell,))
    return Reference(table=table, frame=frame, teacher_ms=teacher_ms, tail=tail)


def _timed(shapes: Sequence[Arch], body: Body, frame: Frame, ctx: Context) -> tuple[list[float], float, float]:
    """Medians of shapes beside the teacher, the teacher's, and the usual p95 over p50."""
    if ctx.teacher_graph is None:
        raise StageError("search needs the teacher's ONNX graph to compare with")
    ctx.progress.start("latency table: build models", len(shapes))
    subjects = [Subject(name="teacher", path=ctx.teacher_graph)]
    for i, arch in enumerate(shapes):
        subjects.append(Subject(name=str(i), path=build_graph(body, arch, frame, ctx, ctx.work / f"p{i}.onnx")))
        ctx.progress.advance()
    ctx.progress.stop()
    samples = time_graphs(subjects, ctx, blocks=40)
    for subject in subjects[1:]:
        subject.path.unlink()
    medians = [float(np.median(s.ms)) for s in samples]
    tails = [float(np.percentile(s.ms, 95) / np.median(s.ms)) for s in samples[1:]]
    return medians[1:], medians[0], float(np.median(tails))


def _estimated(shapes: Sequence[Arch], body: Body, frame: Frame, ctx: Context) -> tuple[list[float], float, float]:
    ctx.progress.start("latency table: compile models", len(shapes) + 1)
    found = []
    with Estimator(ctx.target, ctx.work) as estimate:
        for arch in (body.student.arch, *shapes):
            found.append(estimate(body, arch, frame).ms)
            ctx.progress.advance()
    ctx.progress.stop()
    return found[1:], found[0], DEFAULT_TAIL


def build_graph(body: Body, arch: Arch, frame: Frame, ctx: Context, output: Path) -> Path:
    """Cut, export and lower one shape as it would ship; time does not depend on the weights."""
    build_graphs(body, arch, {output: frame}, static=ctx.target.is_static, symmetric=ctx.target.symmetric)
    return output


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
