"""Find the shape: propose, predict, score, measure, try out the best, and correct until the budget is used up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekd.arch import Arch
from edgekd.calibrate.bodies import body_of_student
from edgekd.devices import is_estimated, unavailable
from edgekd.errors import RecipeError
from edgekd.families.compact import movable
from edgekd.files import sha256_json
from edgekd.search.allocate import Costs, additive, allocate
from edgekd.search.candidates import Means, Pool
from edgekd.search.evidence import save_evidence
from edgekd.search.evolution import Evolution, evolve
from edgekd.search.front import FILES, Candidate, Front
from edgekd.search.hunt import Hunt
from edgekd.search.predictor import Predictor, Reference
from edgekd.search.proxies import PROXIES, gather
from edgekd.search.reference import droppable_layers, find_reference
from edgekd.search.space import Space, Steps
from edgekd.search.steps import choose_steps
from edgekd.search.timing import Gauge
from edgekd.search.tournament import Tournament
from edgekd.search.variants import Lengths
from edgekd.student import Student
from edgekd.supernet.space import kept_layers
from edgekd.surgery import measure_importance
from edgekd.surgery.curves import Curves, layer_errors
from edgekd.surgery.sample import sample_batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.search import Search, Variant
    from edgekd.search.proxies import ProxyContext

SHOWN = 20
"""Candidates in the ledger; the files have all of them."""


def choose(settings: Search, student: Student, ctx: Context) -> Student:
    """See `Search`.

    Raises:
        BudgetError: even the smallest shape misses the budget; the message has the nearest point.
        RecipeError: layers of the student share attention.
    """
    if any(layer.shares for layer in student.arch.layers):
        raise RecipeError(
            "search: layers of this model share attention already, so that not every choice of layers and heads is "
            "possible; begin with the model it was made from"
        )
    if not ctx.budget.asks_latency:
        ctx.notes["reason"] = "the budget does not limit the latency; the full shape is kept"
        return replace(student, plan=student.arch)
    settings = replace(settings, variants=_variants(settings, student, ctx))
    reference = find_reference(settings, student, ctx)
    predict = reference.predictor(ctx.reshape)
    importance = measure_importance(student, sample_batches(ctx.train, settings.samples, seed=ctx.seed))
    evidence = gather(student, importance, ctx, settings.samples)
    means = _means(settings, student, ctx, reference, predict, evidence)
    pool = Pool(settings, means)
    gauge = Gauge(reference.teacher_ms, ctx)
    body = body_of_student(student, ctx.task.name)
    hunt = Hunt(settings, pool, gauge, body, reference.tail, ctx)
    tournament = Tournament(settings, hunt, student, importance, ctx)
    winner = tournament.run() if settings.finalists > 1 or settings.init else hunt.run()
    foreign = isinstance(winner, Student)
    plan = winner.arch if isinstance(winner, Student) else winner
    _report(ctx, hunt, tournament, reference, plan, foreign=foreign)
    return replace(winner if isinstance(winner, Student) else student, plan=plan)


def _variants(settings: Search, student: Student, ctx: Context) -> list[Variant]:
    """What the recipe says, or fewer tokens where they can be timed, trained and judged: texts on this machine."""
    if settings.variants is not None:
        return settings.variants
    timed = unavailable(ctx.target) is None and not is_estimated(ctx.target)
    compact = movable(student.model, student.family)[0] and not student.ordered
    fit = ctx.task.kind == "text" and ctx.budget.sequence and settings.finalists > 1 and settings.strategy == "auto"
    return ["padding", "tokens"] if timed and compact and fit else []


def _means(
    settings: Search, student: Student, ctx: Context, reference: Reference, predict: Predictor, evidence: ProxyContext
) -> Means:
    cells = [cell for _, cell in reference.table.mix(reference.frame).cells]
    steps = replace(choose_steps(cells, student.arch, settings.head_step, settings.neuron_step), least=_least(student))
    ctx.notes["steps"] = {"heads": steps.heads, "neurons": steps.neurons}
    importance = evidence.importance
    order = sorted(range(len(student.arch.layers)), key=lambda i: -float(importance.layers[i]))
    droppable, trained = droppable_layers(student), (student.trained or {}).get("layers", 1)
    fewest, count = max(droppable.count(False), trained, 1), len(droppable)
    space = Space.of(
        student.arch, droppable, steps,
        min_layers=max(settings.min_layers, trained), hidden=() if student.ordered else reference.hidden, order=order,
        depths=[kept_layers(droppable, keep) for keep in range(fewest, count + 1)] if student.ordered else (),
    )  # fmt: skip
    score = PROXIES[settings.proxy](evidence)
    ctx.progress.say(f"search: {space.size:.3g} shapes, heads in steps of {steps.heads}, neurons of {steps.neurons}")

    def evolved(limit: float, starts: Sequence[Arch]) -> list[Candidate]:
        label = [settings.proxy, settings.samples, ctx.train.fingerprint, student.arch.to_dict(), ctx.strictness]
        evolution = Evolution(
            space=space, limit=limit, trials=settings.trials, population=settings.population,
            folder=ctx.work / "evolution", seed=ctx.seed, label=sha256_json(label),
        )  # fmt: skip
        files = None
        if settings.jobs > 1:
            folder = ctx.work / "evolution" / "evidence"
            files = settings.proxy, save_evidence(evidence, folder, auto_class=ctx.task.auto_class)
        return evolve(
            evolution, score, predict, starts=starts, progress=ctx.progress, jobs=settings.jobs, evidence=files
        )

    return Means(
        space=space, steps=steps, score=score, predict=predict, importance=importance, evolve=evolved,
        lengths=Lengths.of(ctx.budget.sequence, ctx.train.lengths),
        allocate=_allocator(student, evidence, steps, predict),
    )  # fmt: skip


def _least(student: Student) -> tuple[tuple[int, int], ...]:
    """The fewest heads and neurons by layer that a supernet has trained; empty for other students."""
    if not student.trained:
        return ()
    heads, neurons = float(student.trained["heads"]), float(student.trained["neurons"])
    own = {layer.source: layer for layer in student.arch.layers}
    found = [(0, 0)] * (max(own) + 1)
    for source, layer in own.items():
        found[source] = (math.ceil(heads * layer.heads), math.ceil(neurons * layer.neurons))
    return tuple(found)


def _allocator(
    student: Student, evidence: ProxyContext, steps: Steps, predict: Predictor
) -> Callable[[Sequence[int] | None, float], Arch | None]:
    """A function of kept layers and a limit; curves of errors and costs are worked out at its first call."""
    tables: list[tuple[Curves, Costs]] = []

    def allocated(kept: Sequence[int] | None, limit: float) -> Arch | None:
        if student.ordered or not all(layer.plain for layer in student.arch.layers):
            return None
        if not tables:
            curves = layer_errors(student, evidence.batches, steps.heads, steps.neurons)
            tables.append((curves, additive(student.arch, predict, steps)))
        curves, costs = tables[0]
        return allocate(student.arch, curves, predict, limit, steps, kept, costs)

    return allocated


def _report(
    ctx: Context, hunt: Hunt, tournament: Tournament, reference: Reference, plan: Arch, *, foreign: bool
) -> None:
    """Write the front and say in the ledger what was chosen, and why."""
    front = Front(hunt.pool.known.values())
    own = None if foreign else plan
    reason = _reason(ctx, hunt, tournament, plan)
    front.write(ctx.work, own, limit=hunt.limit, reason=reason)
    ranked = sorted(hunt.pool.known.values(), key=lambda candidate: candidate.proxy)[:SHOWN]
    ctx.progress.say(f"search: {plan.describe()}: {reason}")
    ctx.notes.update(
        shape=plan.describe(),
        reason=reason,
        strategy=hunt.pool.strategy,
        predicted_ms=None if foreign else hunt.predict(plan),
        teacher_ms=reference.teacher_ms,
        table=reference.source,
        table_error=[dict(cell.error) for _, cell in reference.table.mix(reference.frame).cells],
        checks=hunt.checks,
        finalists=tournament.table(),
        candidates=[
            {"shape": c.arch.describe(), "divergence": c.proxy, "predicted_ms": c.predicted_ms, "by": c.by}
            for c in ranked
        ],
        front=front.points(own),
        files=list(FILES),
    )


def _reason(ctx: Context, hunt: Hunt, tournament: Tournament, plan: Arch) -> str:
    """Why this point, in one sentence."""
    used = hunt.measured.get(plan)
    size = f"it uses {used:.0%} of the budget as {hunt.gauge.how}" if used is not None else "its latency is predicted"
    first = tournament.standings
    if len(first) > 1:
        best, other = first[0], first[1]
        why = (
            f"of {len(first)} finalists distilled for a short while its layers came nearest to the teacher's answers "
            f"(divergence {best.divergence:.3g}, the next {other.divergence:.3g})"
        )
        if best.finalist.source:
            return f"{best.finalist.source}, which is within the budget: {why}"
        return f"{why}, and {size}"
    proxy = hunt.settings.proxy
    return f"among {len(hunt.pool.known)} scored shapes it has the lowest {proxy} of those that fit, and {size}"
