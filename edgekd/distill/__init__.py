"""Distillation: recover a student's accuracy from its teacher. Importing this package does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from edgekd.distill.bounds import problems
from edgekd.distill.terms import LossSettings, parse_terms
from edgekd.errors import RecipeError

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

__all__ = ["Distill", "LossSettings"]


def _default_losses() -> LossSettings:
    return {"forward_kl": {"weight": 1.0, "temperature": 2.0}, "hidden_mse": 1.0}


@dataclass(frozen=True, kw_only=True)
class Distill:
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
    batch_size: Annotated[int, Ge(1)] = 32
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    losses: LossSettings = field(default_factory=_default_losses)
    layer_map: Literal["even", "source"] = "even"
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.06
    weight_decay: Annotated[float, Ge(0)] = 0.01
    gradient_accumulation: Annotated[int, Ge(1)] = 1
    gradient_clip: Annotated[float, Ge(0)] = 1.0
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    patience: Annotated[int, Ge(0)] = 0
    evaluate_steps: Annotated[int, Ge(0)] = 0
    freeze_embeddings: bool | None = None
    dropout: Annotated[float, Ge(0), Lt(1)] | None = 0.0
    copies: Annotated[int, Ge(0)] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    cache: bool = True
    cache_limit_gb: Annotated[float, Ge(0)] = 4.0
    checkpoint_seconds: Annotated[float, Ge(0)] = 60.0
    checkpoint_steps: Annotated[int, Ge(0)] = 0
    force: bool = False

    def __post_init__(self) -> None:
        """Check all settings.

        Raises:
            RecipeError: names all that are wrong.
        """
        wrong = list(problems(self))
        try:
            parse_terms(self.losses)
        except RecipeError as error:
            wrong.append(str(error))
        if wrong:
            raise RecipeError("; ".join(wrong))

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with trained weights; the student given is left as it is.

        Raises:
            RecipeError: a loss cannot be had for these two models, or training diverged.
        """
        from edgekd.distill.recover import recover

        return recover(self, student, ctx)
