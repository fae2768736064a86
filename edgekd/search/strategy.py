"""Find the shape: predict, score, build the winner, measure it, correct the prediction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekd.arch import Arch
from edgekd.calibrate.bodies import body_of_student
from edgekd.calibrate.estimates import Estimator
from edgekd.devices import is_estimated, unavailable
from edgekd.errors import BudgetError, StageError
from edgekd.latency.bench import Subject
from edgekd.latency.stats import summarize
from edgekd.search.reference import Reference, build_graph, droppable_layers, find_reference, time_graphs
from edgekd.search.score import Scorer
from edgekd.search.space import Steps, depth_chain, importance_widths, uniform_widths, with_layers
from edgekd.surgery import Importance, measure_importance
from edgekd.surgery.sample import sample_batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.search import Search
    from edgekd.student import Student

CLOSE = 0.90
"""A measured shape that uses at least this share of the budget is not worth enlarging."""


def choose(settings: Search, student: Student, ctx: Context) -> Student:
    """See `Search`.

    Raises:
        BudgetError: even the smallest shape misses the budget; the message has the nearest point.
    """
    if not ctx.budget.asks_latency:
        ctx.notes["reason"] = "the budget does not limit the latency; the full shape is kept"
        return replace(student, plan=student.arch)
    reference = find_reference(settings, student, ctx)
    importance = measure_importance(student, sample_batches(ctx.train, settings.samples, seed=ctx.seed))
    hunt = _Hunt(settings, student, importance, reference, ctx)
    plan = hunt.run()
    ctx.notes.update(
        shape=plan.describe(),
        predicted_ms=hunt.predict(plan),
        teacher_ms=reference.teacher_ms,
        table=reference.source,
        table_error=[dict(cell.error) for _, cell in reference.table.mix(reference.frame).cells],
        checks=hunt.checks,
        candidates=hunt.candidates,
    )
    return replace(student, plan=plan)


def _finite(interval: tuple[float, float] | None, end: int, value: float | None) -> float:
    """One end of an interval, or the value itself where the samples cannot bound it."""
    bound = interval[end] if interval is not None else math.inf
    return bound if math.isfinite(bound) and bound > 0 else float(value or math.inf)


class _Hunt:
    """One search: candidates under a limit, scored; the best is built and measured, and the limit corrected."""

    def __init__(
        self, settings: Search, student: Student, importance: Importance, reference: Reference, ctx: Context
    ) -> None:
        self.settings, self.student, self.importance, self.ctx = settings, student, importance, ctx
        self.reference = reference
        self.body = body_of_student(student, ctx.task.name)
        self.predict = reference.predictor()
        self.score = Scorer(student, importance, ctx, settings.samples)
        self.steps = Steps(settings.head_step, settings.neuron_step)
        self.aim = (1 - settings.margin) * ctx.strictness
        self.checks: list[dict[str, Any]] = []
        self.candidates: list[dict[str, Any]] = []

    def run(self) -> Arch:
        """Alternate between choosing and measuring until the measured latency is just under the budget."""
        limit = self.first_limit() * self.aim
        self.require_reachable(limit)
        chain = self.chain(limit)
        measured: list[tuple[float, Arch]] = []
        plan = self.best(chain, limit)
        for _ in range(self.settings.checks):
            used = self.used(plan)
            measured.append((used, plan))
            self.checks.append({"shape": plan.describe(), "limit_ms": limit, "used": used})
            self.ctx.progress.say(f"search: {plan.describe()} uses {used:.0%} of the budget as {self.how}")
            enough = used >= CLOSE * self.ctx.strictness or plan == self.student.arch
            if used <= self.ctx.strictness and enough:
                return plan
            limit *= self.aim / used
            plan = self.best(chain, limit)
            if any(plan == known for _, known in measured):
                break
        return self.settle(measured, plan)

    def require_reachable(self, limit: float) -> None:
        """Where not even the smallest shape is predicted to fit, measure that one first.

        Raises:
            BudgetError: it misses the budget as measured.
        """
        smallest = self.smallest()
        if self.predict(smallest) > limit and (used := self.used(smallest)) > self.ctx.strictness:
            raise BudgetError(self.out_of_reach(used, smallest))

    def settle(self, measured: list[tuple[float, Arch]], plan: Arch) -> Arch:
        """The largest measured shape within the budget; if none is, the last plan, or an error if it is the least."""
        if not measured:
            return plan
        within = [pair for pair in measured if pair[0] <= self.ctx.strictness]
        if within:
            return max(within, key=lambda pair: pair[0])[1]
        used, nearest = min(measured, key=lambda pair: pair[0])
        if nearest == self.smallest():
            raise BudgetError(self.out_of_reach(used, nearest))
        return nearest

    def first_limit(self) -> float:
        """The median in table milliseconds that would use up the budget."""
        budget, reference = self.ctx.budget, self.reference
        limits = []
        if budget.speedup is not None:
            limits.append(reference.teacher_ms / budget.speedup)
        if budget.latency_p95_ms is not None:
            limits.append(budget.latency_p95_ms / reference.tail)
        return min(limits)

    def chain(self, limit: float) -> list[tuple[int, ...]]:
        """Layer subsets by depth; shallower than what fits at full width is of no use."""
        arch = self.student.arch
        fewest = len(arch.layers)
        while fewest > self.settings.min_layers and self.predict(with_layers(arch, range(fewest))) > limit * 0.6:
            fewest -= 1
        self.ctx.progress.say(f"search: which layers to keep (down to {fewest} of {len(arch.layers)})")
        return depth_chain(arch, droppable_layers(self.student), self.score, fewest=fewest)

    def best(self, chain: list[tuple[int, ...]], limit: float) -> Arch:
        """The candidate under the limit with the lowest divergence; the smallest shape if none fits."""
        shapes: list[Arch] = []
        for kept in chain:
            arch = self.student.arch
            for shape in (
                uniform_widths(arch, kept, limit, self.predict, self.steps),
                importance_widths(arch, kept, limit, self.predict, self.steps, self.importance),
            ):
                if shape is not None and shape not in shapes:
                    shapes.append(shape)
        if not shapes:
            return self.smallest()
        scored = sorted(((self.score(shape), shape) for shape in shapes), key=lambda pair: pair[0])
        self.candidates = [
            {"shape": shape.describe(), "divergence": score, "predicted_ms": self.predict(shape)}
            for score, shape in scored
        ]
        return scored[0][1]

    def smallest(self) -> Arch:
        """As few layers as allowed, one head and one step of neurons each."""
        arch, droppable = self.student.arch, droppable_layers(self.student)
        fixed = [i for i in range(len(arch.layers)) if not droppable[i]]
        spare = [i for i in range(len(arch.layers)) if droppable[i]]
        kept = sorted(fixed + spare[: max(self.settings.min_layers - len(fixed), 0)])
        layers = tuple(
            replace(layer, heads=min(layer.heads, 1), neurons=min(layer.neurons, self.settings.neuron_step))
            for layer in with_layers(arch, kept).layers
        )
        return replace(arch, layers=layers)

    def used(self, plan: Arch) -> float:
        """Share of the budget at the worse end of its interval: at 1 the verdict is just a pass.

        The teacher is measured in the same run. Where nothing can be run, an estimate or the prediction has to do.
        """
        if unavailable(self.ctx.target) is not None:
            return self.share(self.predict(plan))
        if is_estimated(self.ctx.target):
            with Estimator(self.ctx.target, self.ctx.work) as estimate:
                return self.share(estimate(self.body, plan, self.reference.frame).ms)
        budget, graph = self.ctx.budget, self.ctx.teacher_graph
        if graph is None:
            raise StageError("search needs the teacher's ONNX graph to compare with")
        file = build_graph(self.body, plan, self.reference.frame, self.ctx, self.ctx.work / "check.onnx")
        pair = [Subject(name="teacher", path=graph), Subject(name="student", path=file)]
        teacher, sample = time_graphs(pair, self.ctx, blocks=120)
        seen = summarize(sample, target=self.ctx.target.name, baseline=teacher)
        shares = []
        if budget.speedup is not None:
            shares.append(budget.speedup / _finite(seen.speedup_ci99, 0, seen.speedup))
        if budget.latency_p95_ms is not None:
            shares.append(_finite(seen.p95_ci99_ms, 1, seen.p95_ms) / budget.latency_p95_ms)
        return max(shares)

    def share(self, ms: float) -> float:
        """Share of the budget that a latency without an interval uses."""
        budget, shares = self.ctx.budget, []
        if budget.speedup is not None:
            shares.append(budget.speedup * ms / self.reference.teacher_ms)
        if budget.latency_p95_ms is not None:
            shares.append(ms / budget.latency_p95_ms)
        return max(shares)

    @property
    def how(self) -> str:
        """How latencies are known on this target."""
        if unavailable(self.ctx.target) is not None:
            return "predicted"
        return "estimated by the vendor's compiler" if is_estimated(self.ctx.target) else "measured"

    def out_of_reach(self, used: float, plan: Arch) -> str:
        """Say what was asked, and how near the smallest shape comes."""
        budget = self.ctx.budget
        if budget.latency_p95_ms is not None:
            asked = f"p95 of {budget.latency_p95_ms:g} ms"
            near = f"{used * budget.latency_p95_ms:.3g} ms"
        else:
            asked, near = f"speedup of {budget.speedup:g}", f"{(budget.speedup or 0) / used:.3g}×"
        return (
            f"the budget ({asked} at batch {budget.batch}, sequence {budget.sequence}) is out of reach on "
            f"{self.ctx.target.name}: the nearest point is {near}, with the smallest student ({plan.describe()})"
        )
