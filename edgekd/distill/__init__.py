"""Distillation: recover a student's accuracy from its teacher. Importing this package does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from edgekd.distill.settings import Taught
from edgekd.distill.terms import LossSettings

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

__all__ = ["Distill", "LossSettings"]


@dataclass(frozen=True, kw_only=True)
class Distill(Taught):
    """Train the student to give its teacher's answers, and keep the weights that score best on validation.

    `losses` maps names to a weight or to `{weight: …, setting: …}`. `layer_map` matches hidden layers `even`ly or by
    the `source` each student layer comes from. `freeze_embeddings` (unset: for text) leaves the word embeddings as
    they are. `dropout` unset keeps the model's own. `copies`: so many noisy copies of each text are
    answered by the teacher, and every epoch takes each text in another version. `cache` keeps teacher outputs on disk
    up to `cache_limit_gb` (10^9 bytes), beyond which the teacher runs live. `warmup` is a fraction of all steps. 0
    turns off `gradient_clip`, `ema`, `patience` (evaluations without a better score), `evaluate_steps` (then every
    epoch), `checkpoint_seconds` and `checkpoint_steps`.
    """

    buys: ClassVar[tuple[str, ...]] = ("metric",)

    epochs: Annotated[int, Ge(1)] = 6
    layer_map: Literal["even", "source"] = "even"
    dropout: Annotated[float, Ge(0), Lt(1)] | None = 0.0
    copies: Annotated[int, Ge(0)] = 0

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with trained weights; the student given is left as it is.

        Raises:
            RecipeError: a loss cannot be had for these two models, or training diverged.
        """
        from edgekd.distill.recover import recover

        return recover(self, student, ctx)
