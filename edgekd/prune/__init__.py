"""Structured pruning: cut the model to the shape that search chose. Importing this package does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError, unknown

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

CRITERIA = ("activation", "activation_weight")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Keep the most important heads and neurons of each kept layer; the weights get physically smaller.

    Importance is activation-based (Minitron, Muralidharan et al. 2024, arXiv 2407.14679), measured on `samples`
    training examples. Without a plan from search, `layers` (indices to keep), `heads` and `neurons` (a count for
    all layers, or one per kept layer) state the shape.
    """

    criterion: str = "activation_weight"
    samples: int = 512
    layers: list[int] | None = None
    heads: int | list[int] | None = None
    neurons: int | list[int] | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            RecipeError: unknown criterion or no samples.
        """
        if self.criterion not in CRITERIA:
            raise RecipeError(unknown("criterion", self.criterion, CRITERIA))
        if self.samples < 1:
            raise RecipeError(f"samples must be at least 1, not {self.samples!r}")

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the smaller student; the one given is left as it is.

        Raises:
            RecipeError: there is neither a plan nor a shape in the settings, or the shape does not fit the model.
        """
        from edgekd.prune.plan import plan_from_settings
        from edgekd.surgery import cut, measure_importance
        from edgekd.surgery.sample import sample_batches

        stated = (self.layers, self.heads, self.neurons) != (None, None, None)
        plan = plan_from_settings(student.arch, self.layers, self.heads, self.neurons) if stated else student.plan
        if plan is None:
            raise RecipeError("prune has no shape to cut to: put search before it, or state layers, heads or neurons")
        batches = sample_batches(ctx.train, self.samples, seed=ctx.seed)
        pruned = cut(student, plan, measure_importance(student, batches, criterion=self.criterion))
        ctx.notes["shape"] = plan.describe()
        return replace(pruned, plan=None)


__all__ = ["CRITERIA", "Prune"]
