"""What search knows of latency before it chooses: a table to predict with, and the teacher's own time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd import host
from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body, body_of_student
from edgekd.calibrate.identity import fingerprint, runtime_of
from edgekd.calibrate.shapes import convolution_shapes, short_chains
from edgekd.devices import is_estimated, unavailable, usual_threads
from edgekd.errors import ModelError, RecipeError, TargetError
from edgekd.export.onnx import OPSET
from edgekd.files import sha256_file, sha256_json
from edgekd.latency.cell import Frame
from edgekd.latency.fit import fit
from edgekd.latency.table import Conditions, LatencyTable, find_table, load
from edgekd.search.predictor import Reference, read_reference, write_reference
from edgekd.search.space import multiples, with_hidden
from edgekd.search.timing import Timings, find_timings, frame_for, narrowed
from edgekd.search.variants import Lengths, fit_saving, kind_of, probes, vary

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.search import Search
    from edgekd.student import Student


def find_reference(settings: Search, student: Student, ctx: Context) -> Reference:
    """A reference from `table`, from the target's own table in `profiles/`, or measured (or estimated) for this search.

    A table holds for this search if it was made for this target, on this CPU with this runtime and as many threads,
    and covers the teacher's family and width at the budget's batch and length. Where operators change what will ship,
    and for every variant, a few changed shapes are timed as well; and some of half the hidden width, if that may
    change and the table does not know it.

    Raises:
        TargetError: the target can be neither measured nor estimated here and no table covers it.
        RecipeError: the table that the recipe names is not there or does not cover the student.
    """
    body = body_of_student(student, ctx.task.name)
    frame = frame_for(body, ctx)
    path = _table_path(settings, ctx)
    key = {
        "cpu": host.cpu_name(), "runtime": runtime_of(ctx.target), "contents": sha256_file(path) if path else "",
        "arch": student.arch.to_dict(), "target": ctx.target.fingerprint, "lowering": ctx.lowering, "opset": OPSET,
        "shape": [ctx.budget.batch, ctx.budget.sequence, ctx.budget.threads], "hidden": settings.hidden_step,
        "reshaped": [ctx.reshape(shape).to_dict() for shape in probes(student.arch)], "variants": settings.variants,
        "frame": asdict(frame), "graph": sha256_file(ctx.teacher_graph) if ctx.teacher_graph else "",
        "lengths": asdict(Lengths.of(ctx.budget.sequence, ctx.train.lengths)),
    }  # fmt: skip
    file = ctx.cache / f"latency-{sha256_json(key)[:16]}.json"
    if file.is_file():
        return read_reference(file)
    measured = _Measured(settings, body, frame, ctx)
    reference = (path and _from_table(path, settings, measured)) or _own(measured)
    ctx.cache.mkdir(parents=True, exist_ok=True)
    write_reference(file, reference)
    return reference


class _Measured:
    """What is timed in one run: shapes of the table, changed ones of each variant, and narrower ones."""

    def __init__(self, settings: Search, body: Body, frame: Frame, ctx: Context) -> None:
        self.body, self.frame, self.ctx = body, frame, ctx
        self.arch = body.student.arch
        lengths = Lengths.of(ctx.budget.sequence, ctx.train.lengths)
        self.changed: dict[str, list[tuple[Arch, Arch]]] = {}
        for name in ["", *(settings.variants or ())] if frame.head_dim else [""]:
            for shape in probes(self.arch):
                pair = shape, ctx.reshape(vary(name, shape, lengths))
                if pair[1] != shape and pair not in (pairs := self.changed.setdefault(kind_of(name), [])):
                    pairs.append(pair)
        self.hidden = self._narrower(settings.hidden_step)
        self.times: dict[Arch, float] = {}

    def _narrower(self, step: int) -> list[int]:
        """Widths of the residual stream below its own, where the family can narrow it."""
        widths = [width for width in multiples(step, self.arch.hidden) if width < self.arch.hidden] if step else []
        with contextlib.suppress(ModelError):
            for width in widths[:1]:
                narrowed(self.body, width)
            return widths
        self.ctx.progress.say("search: the residual stream of this model cannot be narrowed; hidden_step does nothing")
        return []

    def shapes(self) -> list[Arch]:
        """About ten shapes that tell what the parts of this teacher cost."""
        if self.arch.layers[0].heads:
            return short_chains(self.arch)
        return convolution_shapes(self.arch, droppable_layers(self.body.student))

    def time(self, shapes: Sequence[Arch], *, narrow: bool) -> Timings:
        """Time shapes, and all that is needed besides, next to each other."""
        everything = [*shapes, *(after for pairs in self.changed.values() for _, after in pairs)]
        everything += self.narrow() if narrow else []
        everything = list(dict.fromkeys(everything))
        found = find_timings(everything, self.body, self.frame, self.ctx)
        self.times = dict(zip(everything, found.ms, strict=True))
        return Timings([self.times[shape] for shape in shapes], found.teacher_ms, found.tail)

    def narrow(self) -> list[Arch]:
        """The shapes again, at the least width of the residual stream."""
        return [with_hidden(shape, self.hidden[0]) for shape in self.shapes()] if self.hidden else []

    def completed(self, reference: Reference) -> Reference:
        """The reference with savings, and with a cell of narrower shapes if some were timed."""
        narrow = [shape for shape in self.narrow() if shape in self.times]
        table = reference.table
        if narrow:
            frame = replace(self.frame, hidden=self.hidden[0])
            ms = [self.times[shape] / reference.scale for shape in narrow]
            cell = fit(narrow, ms, frame, by_source=bool(frame.outline))
            table = replace(table, cells=(*table.cells, cell))
        whole = bool(narrow) or all(table.covers(replace(self.frame, hidden=width)) for width in self.hidden)
        hidden = self.hidden if whole else []
        predict, savings = replace(reference, table=table).predictor(), {}
        for name, pairs in self.changed.items():
            timed = [(before, after) for before, after in pairs if after in self.times]
            if timed:
                ms = [self.times[after] for _, after in timed]
                saved = [
                    (self.times.get(before) or predict(before)) - own
                    for own, (before, _) in zip(ms, timed, strict=True)
                ]
                savings[name] = fit_saving(timed, saved, ms, predict.costs, self.ctx.budget.sequence)
        return replace(reference, table=table, savings=savings, hidden=(*hidden, self.arch.hidden))


def _table_path(settings: Search, ctx: Context) -> Path | None:
    if settings.table is None:
        return find_table(ctx.target.name)
    if not Path(settings.table).is_file():
        raise RecipeError(f"there is no latency table at {settings.table!r}; leave `table` out to measure one")
    return Path(settings.table)


def _from_table(path: Path, settings: Search, measured: _Measured) -> Reference | None:
    """A reference from a table that was made before, brought to the speed of now by three models where possible."""
    table, ctx, frame = load(path), measured.ctx, measured.frame
    if reason := _foreign(table, frame, ctx):
        if settings.table:
            raise RecipeError(f"the latency table {path} does not hold here: {reason}")
        return None
    ctx.progress.say(f"search: latencies from {path.name}")
    mix, arch = table.mix(frame), measured.arch
    if unavailable(ctx.target) is not None:
        teacher = _predicted_teacher(table, frame, arch, ctx)
        source = f"{path.name}, nothing was run"
        return measured.completed(Reference(table=table, frame=frame, teacher_ms=teacher, source=source))
    shapes = measured.shapes()
    few = [] if is_estimated(ctx.target) else [shapes[0], shapes[len(shapes) // 2], shapes[-1]]
    wider = bool(measured.hidden) and not table.covers(replace(frame, hidden=measured.hidden[0]))
    found = measured.time(few, narrow=wider)
    reference = Reference(
        table=table, frame=frame, teacher_ms=found.teacher_ms, tail=found.tail, source=path.name,
        scale=float(np.median(np.asarray(found.ms) / mix.predict(few))) if few else 1.0,
    )  # fmt: skip
    return measured.completed(reference)


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


def _own(measured: _Measured) -> Reference:
    """A table of this teacher alone: about ten shapes, timed beside the teacher or compiled."""
    ctx, frame = measured.ctx, measured.frame
    if reason := unavailable(ctx.target):
        raise TargetError(
            f"search needs latencies, and {ctx.target.name} is unavailable: {reason}. Give a table made where it is "
            "there (`edgekd calibrate`, stages.search.table), or leave search out and give prune its layers, heads "
            "and neurons"
        )
    shapes = measured.shapes()
    found = measured.time(shapes, narrow=True)
    cell = fit(shapes, found.ms, frame, by_source=bool(frame.outline))
    kind = "vendor_estimate" if is_estimated(ctx.target) else "measured"
    table = LatencyTable(conditions=Conditions(target=ctx.target.name, kind=kind), cells=(cell,))
    return measured.completed(Reference(table=table, frame=frame, teacher_ms=found.teacher_ms, tail=found.tail))


def droppable_layers(student: Student) -> list[bool]:
    """Which layers may be left out."""
    family, model = student.family, student.model
    return [family.droppable(model, i) for i in range(len(student.arch.layers))]
