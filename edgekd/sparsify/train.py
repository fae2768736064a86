"""Sparse finetuning in the one training loop: masks by schedule, hidden weights held at zero, the best settled ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edgekd.distill.job import Job, Outcome
from edgekd.distill.recover import fit
from edgekd.files import sha256_json
from edgekd.sparsify import Sparsify
from edgekd.sparsify.masked import Masks
from edgekd.sparsify.plan import Plan
from edgekd.sparsify.rounding import Rounding
from edgekd.sparsify.schedule import Ramp, annealed

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

ADAPTING = 10
"""Steps between the masks of AST, unless the recipe says others."""
ANNEALED = 0.25
"""The share of all steps over which the decay of AST rises, 10,000 of 40,000 there."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What happens to masks and to the rounding (if any) over the steps of a run."""

    settings: Sparsify
    plan: Plan
    masks: Masks
    rounding: Rounding | None = None

    @property
    def ramp(self) -> Ramp:
        """When masks are set; adaptive ones from the first step on."""
        start, end = self.settings.ramp
        if self.settings.masks == "adaptive":
            return Ramp(start=0.0, end=end, every=self.settings.mask_steps or ADAPTING)
        return Ramp(start=start, end=end, every=self.settings.mask_steps)

    def before_step(self, step: int, total: int) -> None:
        """Set the masks that are due; everything else depends on the step alone, for runs that go on after a kill."""
        ramp, kind = self.ramp, self.settings.masks
        if kind == "adaptive" and ramp.due(step, total):
            self.plan.choose(self.masks)
        if kind == "adaptive" and step == ramp.last(total):
            self.plan.settle(self.masks)
        self.masks.adapt(kind == "adaptive" and step < ramp.last(total))
        if kind == "gradual" and ramp.due(step, total):
            self.plan.cut(self.masks, ramp.share(step, total))
        self.masks.apply()
        if self.rounding is not None:
            self.rounding.quantized.freeze(total // 2 if kind == "fixed" else ramp.last(total))

    def after_step(self) -> None:
        """Hold hidden weights at zero."""
        self.masks.apply()
        if self.rounding is not None:
            self.rounding.quantized.step()

    def decay(self, step: int, total: int) -> Mapping[nn.Parameter, Tensor]:
        """What pulls at weights behind adaptive masks; annealed over a quarter of the steps, as AST does it."""
        largest, ramp = self.settings.mask_decay, min(ANNEALED, self.ramp.end)
        return self.masks.decay(annealed(step, total, ramp=ramp, largest=largest))

    def settled(self, done: int, total: int) -> bool:
        """Whether the masks are those that ship."""
        return self.settings.masks == "fixed" or self.ramp.settled(done, total)

    def of(self, job: Job) -> Job:
        """The training job with all this in it."""
        return replace(
            job,
            before_step=self.before_step,
            after_step=self.after_step,
            decay=self.decay if self.settings.masks == "adaptive" else None,
            settled=self.settled,
            fingerprint=sha256_json([job.fingerprint, self.plan.pattern.name, dict(self.plan.densities)]),
        )


def train_sparse(course: Course, student: Student, ctx: Context) -> Outcome:
    """Train the student of the plan in place; its masks are then final, and its weights those that scored best.

    Raises:
        RecipeError: a loss cannot be had for student and teacher, or training diverged.
        StageError: a masked weight came back to life.
    """
    rounding = course.rounding
    outcome = fit(
        course.settings,
        student,
        ctx,
        modules=None if rounding is None else {"quantizers": rounding.quantized},
        precision=None if rounding is None else "fp32",
        change=course.of,
    )
    course.masks.adapt(False)
    course.masks.apply()
    course.masks.verify()
    return outcome
