"""Build shapes as they would ship and find out how long they take: timed beside the teacher, or compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body
from edgekd.calibrate.estimates import Estimator
from edgekd.calibrate.graphs import build_graphs
from edgekd.devices import is_estimated, unavailable
from edgekd.errors import ModelError, StageError
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.cell import Frame
from edgekd.latency.stats import Samples, join, summarize
from edgekd.latency.table import frame_of
from edgekd.search.space import with_hidden
from edgekd.surgery import cut

if TYPE_CHECKING:
    from edgekd.context import Context

SECONDS = 30.0
"""At most so long for each of the models that take turns, so that large ones are seen as often as small ones."""
SURE = 0.04
"""How much more of the budget the worse end of an interval may use than its middle, or the shapes are measured on."""
LOOKS = 3
"""How often they are measured at most."""
DEFAULT_TAIL = 1.0
"""p95 over p50 of a device that is not timed: its estimates have one figure."""


@dataclass(frozen=True)
class Timings:
    """Medians in milliseconds of some shapes and of the teacher, and the usual p95 over p50."""

    ms: list[float]
    teacher_ms: float
    tail: float = DEFAULT_TAIL


def frame_for(body: Body, ctx: Context) -> Frame:
    """The frame of a body in the form, batch and length of the budget."""
    tokens = ctx.budget.sequence if body.image is None else body.tokens
    return frame_of(body.student.arch, ctx.lowering, ctx.budget.batch, tokens, body.outline)


def narrowed(body: Body, hidden: int) -> Body:
    """The body with a narrower residual stream; which channels stay does not matter to time."""
    own = body.student.arch
    if own.hidden == hidden:
        return body
    scores = replace(body.importance, hidden=torch.ones(own.hidden))
    return replace(body, student=cut(body.student, with_hidden(own, hidden), scores))


def build_graph(body: Body, arch: Arch, frame: Frame, ctx: Context, output: Path) -> Path:
    """Cut, export and lower one shape as it would ship; time does not depend on the weights."""
    body = narrowed(body, arch.hidden)
    frame = replace(frame, hidden=arch.hidden)
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
        settings=Settings(blocks=blocks, max_seconds=SECONDS * len(subjects), seed=ctx.seed),
    )


def find_timings(shapes: Sequence[Arch], body: Body, frame: Frame, ctx: Context) -> Timings:
    """Time shapes beside the teacher, or have them compiled with it where the target is estimated.

    Raises:
        StageError: there is no graph of the teacher to time beside.
    """
    if is_estimated(ctx.target):
        return _estimated(shapes, body, frame, ctx)
    ctx.progress.start("latency table: build models", len(shapes))
    subjects = [Subject(name="teacher", path=teacher_graph(ctx))]
    for i, arch in enumerate(shapes):
        subjects.append(Subject(name=str(i), path=build_graph(body, arch, frame, ctx, ctx.work / f"p{i}.onnx")))
        ctx.progress.advance()
    ctx.progress.stop()
    samples = time_graphs(subjects, ctx, blocks=40)
    for subject in subjects[1:]:
        subject.path.unlink()
    medians = [float(np.median(s.ms)) for s in samples]
    tails = [float(np.percentile(s.ms, 95) / np.median(s.ms)) for s in samples[1:]]
    return Timings(medians[1:], medians[0], float(np.median(tails)))


def _estimated(shapes: Sequence[Arch], body: Body, frame: Frame, ctx: Context) -> Timings:
    ctx.progress.start("latency table: compile models", len(shapes) + 1)
    found = []
    with Estimator(ctx.target, ctx.work) as estimate:
        for arch in (body.student.arch, *shapes):
            own = replace(frame, hidden=arch.hidden)
            found.append(estimate(narrowed(body, arch.hidden), arch, own).ms)
            ctx.progress.advance()
    ctx.progress.stop()
    return Timings(found[1:], found[0])


def teacher_graph(ctx: Context) -> Path:
    """The teacher's graph.

    Raises:
        StageError: there is none.
    """
    if ctx.teacher_graph is None:
        raise StageError("search needs the teacher's ONNX graph to compare with")
    return ctx.teacher_graph


class Gauge:
    """Says what share of the budget a shape uses: measured, estimated by the vendor's compiler, or predicted.

    `teacher_ms` is what predictions and estimates of a speedup are compared with.
    """

    def __init__(self, teacher_ms: float, ctx: Context) -> None:
        self.teacher_ms, self.ctx = teacher_ms, ctx

    @property
    def how(self) -> str:
        """How latencies are known on this target."""
        if unavailable(self.ctx.target) is not None:
            return "predicted"
        return "estimated by the vendor's compiler" if is_estimated(self.ctx.target) else "measured"

    def used(self, plans: Sequence[tuple[Body, Arch, float]]) -> list[float]:
        """Share of the budget at the worse end of its interval: at 1 the verdict is just a pass.

        Each plan is a body, the shape to cut from it and its predicted latency in milliseconds. They are measured in
        turns with the teacher and each other; where something disturbs that so much that an interval is wide, they are
        measured again, and the narrowest interval counts. Where none has an end all looks are taken together, then the
        middle. Where nothing can be run, an estimate or the prediction has to do. What the target's compiler refuses
        uses infinitely much.
        """
        ctx = self.ctx
        if unavailable(ctx.target) is not None:
            return [self.share(ms) for _, _, ms in plans]
        if is_estimated(ctx.target):
            with Estimator(ctx.target, ctx.work) as estimate:
                return [self._estimated(estimate, body, arch) for body, arch, _ in plans]
        subjects = [Subject(name="teacher", path=teacher_graph(ctx))]
        for i, (body, arch, _) in enumerate(plans):
            file = build_graph(body, arch, frame_for(body, ctx), ctx, ctx.work / f"check{i}.onnx")
            subjects.append(Subject(name=f"student{i}", path=file))
        best: list[tuple[float, float]] = []
        taken: list[list[Samples]] = []
        for _ in range(LOOKS):
            taken.append(time_graphs(subjects, ctx, blocks=120))
            best = self._better(best, taken[-1:])
            if all(_spread(shares) <= SURE for shares in best):
                break
        if any(math.isinf(worst) for _, worst in best):
            best = self._better(best, taken)
        return [worst if math.isfinite(worst) else middle for middle, worst in best]

    def _better(self, best: list[tuple[float, float]], taken: Sequence[list[Samples]]) -> list[tuple[float, float]]:
        """The narrower of what was known of each shape and of what these looks together say."""
        teacher, *samples = [join(parts) for parts in zip(*taken, strict=True)]
        seen = [self._shares(sample, teacher) for sample in samples]
        return [min(pair, key=_spread) for pair in zip(seen, best, strict=True)] if best else seen

    def _estimated(self, estimate: Estimator, body: Body, arch: Arch) -> float:
        try:
            ms = estimate(narrowed(body, arch.hidden), arch, frame_for(body, self.ctx)).ms
        except ModelError as error:
            self.ctx.progress.say(f"search: {arch.describe()} is left out: {error}")
            return math.inf
        return self.share(ms)

    def share(self, ms: float) -> float:
        """Share of the budget that a latency without an interval uses."""
        budget, shares = self.ctx.budget, []
        if budget.speedup is not None:
            shares.append(budget.speedup * ms / self.teacher_ms)
        if budget.latency_p95_ms is not None:
            shares.append(ms / budget.latency_p95_ms)
        return max(shares)

    def out_of_reach(self, used: float, shape: str) -> str:
        """Say what was asked, and how near the smallest shape comes."""
        budget = self.ctx.budget
        if budget.latency_p95_ms is not None and budget.speedup is not None:
            asked = f"p95 of {budget.latency_p95_ms:g} ms and speedup of {budget.speedup:g}"
            near = f"{used:.3g} times one of them"
        elif budget.latency_p95_ms is not None:
            asked = f"p95 of {budget.latency_p95_ms:g} ms"
            near = f"{used * budget.latency_p95_ms:.3g} ms"
        else:
            asked, near = f"speedup of {budget.speedup:g}", f"{(budget.speedup or 0) / used:.3g}×"
        return (
            f"the budget ({asked} at batch {budget.batch}, sequence {budget.sequence}) is out of reach on "
            f"{self.ctx.target.name}: the nearest point is {near}, with the smallest student ({shape})"
        )

    def _shares(self, sample: Samples, teacher: Samples) -> tuple[float, float]:
        """Share of the budget that is used, and that at the worse end of the interval, infinite if that is unknown."""
        budget, middle, worst = self.ctx.budget, [], []
        seen = summarize(sample, target=self.ctx.target.name, baseline=teacher)
        if budget.speedup is not None:
            middle.append(budget.speedup / (seen.speedup or math.inf))
            slowest = (seen.speedup_ci99 or (0.0, 0.0))[0]
            worst.append(budget.speedup / slowest if slowest > 0 else math.inf)
        if budget.latency_p95_ms is not None:
            middle.append((seen.p95_ms or math.inf) / budget.latency_p95_ms)
            worst.append((seen.p95_ci99_ms or (0.0, math.inf))[1] / budget.latency_p95_ms)
        return max(middle), max(worst)


def _spread(shares: tuple[float, float]) -> float:
    """By how much the worse end of an interval exceeds its middle, as a share of it."""
    middle, worst = shares
    return worst / middle - 1
