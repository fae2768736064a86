"""The best candidates and other checkpoints against each other, each distilled for a short while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgekd.arch import Arch
from edgekd.calibrate.bodies import body_of_student
from edgekd.devices import unavailable
from edgekd.distill.teachers import fingerprint
from edgekd.files import sha256_json
from edgekd.search.halving import Finalist, Standing, halve
from edgekd.search.hunt import CLOSE, Hunt
from edgekd.search.init import candidates
from edgekd.search.tryout import Tryout
from edgekd.student import Student
from edgekd.surgery import Importance

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.search import Search

LOOSE = 0.92
"""Finalists that use at least this share of what is close enough take part as they are."""


class Tournament:
    """Finds finalists of different kinds in the size that the budget allows, and lets short distillations decide."""

    def __init__(self, settings: Search, hunt: Hunt, student: Student, importance: Importance, ctx: Context) -> None:
        self.settings, self.hunt, self.student, self.importance, self.ctx = settings, hunt, student, importance, ctx
        self.standings: list[Standing] = []

    def run(self) -> Arch | Student:
        """The shape that won, measured to fit, or the checkpoint that won.

        Raises:
            BudgetError: even the smallest shape misses the budget.
        """
        self.hunt.open()
        field = self.shapes()
        checkpoints = self.checkpoints()
        finalists = [Finalist(arch=shape) for shape in field]
        finalists += [Finalist(arch=student.arch, source=name) for name, student in checkpoints.items()]
        label = self.label(checkpoints)
        train = Tryout(self.student, self.importance, checkpoints, self.ctx, label)
        folder = self.ctx.work / "halving"
        self.standings = halve(finalists, train, folder, steps=self.settings.finalist_steps, label=label)
        winner = self.standings[0].finalist
        if winner.source:
            return checkpoints[winner.source]
        found = self.hunt.refine(winner.arch)
        return found if self.hunt.is_alike(found, winner.arch) else self.runner_up(found)

    def runner_up(self, found: Arch) -> Arch:
        """The best finalist that is within the budget as measured, or else the shape that was found instead."""
        within = self.ctx.strictness
        shapes = [standing.finalist.arch for standing in self.standings if not standing.finalist.source]
        return next((shape for shape in shapes if self.hunt.measured.get(shape, within + 1) <= within), found)

    def shapes(self) -> list[Arch]:
        """Shapes for the short distillations; those that miss the budget as measured are brought to its size."""
        hunt = self.hunt
        count = max(self.settings.finalists, 1)
        field = [candidate.arch for candidate in hunt.pool.field(hunt.limit, count)] or [hunt.space.smallest()]
        if not hunt.left:
            return field
        hunt.measure(field)
        sized = []
        for shape in field:
            used = hunt.measured[shape]
            fits = LOOSE * CLOSE * self.ctx.strictness <= used <= self.ctx.strictness or hunt.fits(shape)
            sized.append(shape if fits else hunt.pool.fitted(shape, hunt.corrected(shape)) or shape)
        return list(dict.fromkeys(sized))

    def checkpoints(self) -> dict[str, Student]:
        """The checkpoints of `init` that are within the budget as measured or estimated, by name."""
        if not self.settings.init:
            return {}
        if reason := unavailable(self.ctx.target):
            self.ctx.progress.say(f"search: no checkpoint is tried, nothing can be timed on the target: {reason}")
            return {}
        students = candidates(self.settings.init, self.ctx)
        plans = [(body_of_student(student, self.ctx.task.name), student.arch) for student in students]
        kept = {}
        for name, student, used in zip(self.settings.init, students, self.hunt.use(plans), strict=True):
            self.hunt.checks.append({"shape": student.arch.describe(), "checkpoint": name, "used": used})
            verdict = "takes part" if used <= self.ctx.strictness else "is left out"
            self.ctx.progress.say(f"search: {name} uses {used:.0%} of the budget and {verdict}")
            if used <= self.ctx.strictness:
                kept[name] = student
        return kept

    def label(self, checkpoints: Mapping[str, Student]) -> str:
        """What the results of short distillations depend on."""
        ctx = self.ctx
        students = ctx.teacher, self.student, *checkpoints.values()
        weights = [fingerprint(student.model) for student in students]
        data = [ctx.train.fingerprint, ctx.validation.fingerprint]
        return sha256_json([weights, data, ctx.seed, self.settings.samples])

    def table(self) -> Sequence[dict[str, object]]:
        """The standings as plain data, the best first."""
        return [
            {
                "shape": standing.finalist.arch.describe(), "checkpoint": standing.finalist.source or None,
                "rung": standing.rung, "steps": standing.steps, "divergence": standing.divergence,
            }
            for standing in self.standings
        ]  # fmt: skip
