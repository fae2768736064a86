"""From the shape that is there to the shape that is wanted, at once or in steps with distillation in between.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679): one cut is enough up to about half of the model; beyond that,
prune, distill and repeat. The steps follow a cubic ramp (Zhu & Gupta 2017, arXiv 1710.01878), as "The Journey Matters"
(Jin et al. 2025, arXiv 2501.12486) prunes between 25 % and 75 % of the training compute (ramp shape UNCONFIRMED).
ADAPT: the teacher's own training stands for the first quarter and the distill stage for the last; give that stage at
least half as many epochs as all rounds have together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekd.arch import Arch, Layer
from edgekd.distill import Distill
from edgekd.errors import RecipeError
from edgekd.prune.plan import plan_from_settings
from edgekd.surgery import Importance, cut, measure_importance
from edgekd.surgery.importance import in_order
from edgekd.surgery.reconstruct import cut_and_fit
from edgekd.surgery.replay import Batch
from edgekd.surgery.sample import sample_batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.prune import Prune
    from edgekd.student import Student


def prune(settings: Prune, student: Student, ctx: Context) -> Student:
    """See `Prune.run`."""
    plan = _plan(settings, student)
    ctx.notes["shape"] = plan.describe()
    if student.ordered:
        ctx.notes["reconstruct"] = "no: the student is ordered, its prefix was trained as it is"
        return replace(cut(student, plan, measure_importance(student, ())), plan=None, ordered=False, trained=None)
    batches = sample_batches(ctx.train, settings.samples, seed=ctx.seed)
    rounds: list[dict[str, Any]] = []
    shapes = [plan]
    if settings.rounds > 1:
        influence = measure_importance(student, batches, criterion="activation").layers.tolist()
        shapes = gradual(student.arch, plan, settings.rounds, influence)
    for number, shape in enumerate(shapes, start=1):
        student = _cut_once(settings, student, shape, batches, ctx)
        if number < len(shapes):
            ctx.progress.say(f"prune: round {number} of {len(shapes)}: {shape.describe()}")
            student, metric = _distilled(settings, student, ctx, number)
            rounds.append({"shape": shape.describe(), ctx.task.metric: metric})
    if rounds:
        ctx.notes["rounds"] = rounds
    return replace(student, plan=None)


def gradual(have: Arch, plan: Arch, rounds: int, influence: Sequence[float]) -> list[Arch]:
    """The shapes on the way from `have` to `plan`, at most so many; the last is `plan` itself.

    After round `r` of `R` the share `1 - (1 - r/R)³` of every reduction is done, and nothing is ever smaller than in
    the plan. Layers go in the order of their `influence [L]`, the least first, each at full width until then.
    Operators that differ come with the last shape.
    """
    wanted = {layer.source: layer for layer in plan.layers}
    scored = zip(have.layers, influence, strict=True)
    leaving = [layer.source for layer, _ in sorted(scored, key=lambda pair: pair[1]) if layer.source not in wanted]
    shapes: list[Arch] = []
    for number in range(1, rounds):
        done = 1 - (1 - number / rounds) ** 3
        gone = set(leaving[: int(done * len(leaving))])
        layers = tuple(
            _between_layers(layer, wanted.get(layer.source, layer), done)
            for layer in have.layers
            if layer.source not in gone
        )
        want = plan.channels or have.channels
        channels = tuple(_between(a, b, done) for a, b in zip(have.channels, want, strict=True))
        hidden = channels[-1] if channels else _between(have.hidden, plan.hidden, done)
        shape = replace(have, layers=layers, hidden=hidden, channels=channels)
        if shape not in (have, plan, *shapes):
            shapes.append(shape)
    return [*shapes, plan]


def _between_layers(have: Layer, want: Layer, done: float) -> Layer:
    heads, neurons = _between(have.heads, want.heads, done), _between(have.neurons, want.neurons, done)
    return replace(have, heads=heads, neurons=neurons)


def _between(have: int, want: int, done: float) -> int:
    return max(want, round(have - done * (have - want)))


def _plan(settings: Prune, student: Student) -> Arch:
    stated = (settings.layers, settings.heads, settings.neurons, settings.hidden)
    if stated != (None, None, None, None):
        return plan_from_settings(student.arch, *stated)
    if student.plan is None:
        raise RecipeError(
            "prune has no shape to cut to: put search before it, or state layers, heads, neurons or hidden"
        )
    return student.plan


def _cut_once(settings: Prune, student: Student, shape: Arch, batches: list[Batch], ctx: Context) -> Student:
    if shape == student.arch:
        return student
    # Layers that go are neither scored nor do they feed those that stay.
    shallow = cut(student, _shallow(student.arch, shape), in_order(student))
    scores = _scores(settings, shallow, batches, ctx)
    if not settings.reconstruct:
        return cut(shallow, shape, scores)
    smaller, reason = cut_and_fit(shallow, shape, scores, batches)
    ctx.notes["reconstruct"] = f"no: {reason}" if reason else "yes"
    return smaller


def _shallow(have: Arch, want: Arch) -> Arch:
    """The layers of one shape at the widths of the other."""
    kept = {layer.source for layer in want.layers}
    return replace(have, layers=tuple(layer for layer in have.layers if layer.source in kept))


def _scores(settings: Prune, student: Student, batches: list[Batch], ctx: Context) -> Importance:
    """Importance by the criterion asked for; by activation where layers compute in a way that `obs` cannot replay."""
    criterion = settings.criterion
    if criterion == "obs" and not all(layer.plain for layer in student.arch.layers):
        criterion = "activation"
        ctx.notes["criterion"] = "activation: obs scores only layers that compute as the family's own do"
    return measure_importance(student, batches, criterion=criterion)


def _distilled(settings: Prune, student: Student, ctx: Context, number: int) -> tuple[Student, float]:
    """A short distillation, and the metric on validation after it."""
    from edgekd.distill.recover import recover

    inner = replace(ctx, work=ctx.work / f"round-{number}", notes={})
    student = recover(Distill(epochs=settings.epochs_per_round), student, inner)
    return student, float(inner.notes["training"]["metric"])
