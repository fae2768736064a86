"""What the stages that train have in common. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from edgekd.distill.bounds import problems
from edgekd.distill.terms import LossSettings, parse_terms
from edgekd.errors import RecipeError


def answers_and_states() -> LossSettings:
    """The losses that most stages train by: the teacher's answers, and its hidden states."""
    return {"forward_kl": {"weight": 1.0, "temperature": 2.0}, "hidden_mse": 1.0}


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What every training sets. `warmup` is a fraction of all steps; 0 turns off clip, ema, patience and intervals."""

    epochs: Annotated[int, Ge(0)] = 3
    batch_size: Annotated[int, Ge(1)] = 32
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.06
    weight_decay: Annotated[float, Ge(0)] = 0.01
    gradient_accumulation: Annotated[int, Ge(1)] = 1
    gradient_clip: Annotated[float, Ge(0)] = 1.0
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    patience: Annotated[int, Ge(0)] = 0
    evaluate_steps: Annotated[int, Ge(0)] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    checkpoint_seconds: Annotated[float, Ge(0)] = 60.0
    checkpoint_steps: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True, kw_only=True)
class Training(Loop):
    """A loop with a learning rate that is known beforehand."""

    learning_rate: Annotated[float, Gt(0)] = 2e-4


@dataclass(frozen=True, kw_only=True)
class Taught(Training):
    """Settings of a stage whose training has a teacher; what they mean is said in `Distill`."""

    losses: LossSettings = field(default_factory=answers_and_states)
    freeze_embeddings: bool | None = None
    cache: bool = True
    cache_limit_gb: Annotated[float, Ge(0)] = 4.0
    force: bool = False

    def __post_init__(self) -> None:
        """Check the settings one by one.

        Raises:
            RecipeError: names all that are wrong.
        """
        wrong = [*problems(self), *self._problems()]
        try:
            parse_terms(self.losses)
        except RecipeError as error:
            wrong.append(str(error))
        if wrong:
            raise RecipeError("; ".join(wrong))

    def _problems(self) -> Iterator[str]:
        """What else is wrong, beyond bounds and choices of single settings."""
        yield from ()
