"""Sparse finetuning: zeros that a device can use. Importing this package does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from edgekd.distill.settings import Taught
from edgekd.distill.terms import LossSettings
from edgekd.sparsify.patterns import PATTERNS, PatternName

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

__all__ = ["Sparsify"]


def _default_losses() -> LossSettings:
    return {"squarehead": 1.0, "forward_kl": {"weight": 1.0, "temperature": 2.0}}


@dataclass(frozen=True, kw_only=True)
class Sparsify(Taught):
    """Set weights to zero in a pattern, and train the others to make up for it.

    `pattern` says where zeros stand (`auto`: as the target profits), `sparsity` their share (N:M patterns have their
    own), `allocation` how they are shared out over the matrices. `method` chooses them, on `calibration` training
    examples. `masks`: chosen once (`fixed`), by and by (`gradual`), or changing while the weights behind them live on
    (`adaptive`); they are set every `mask_steps` steps (0: ten times in a ramp, every ten steps where they adapt) over
    the `ramp`, two shares of all steps. `mask_decay`, reached over the first quarter of the steps, pulls weights that
    adaptive masks hide towards zero. `teacher` is the dense `student` itself or the `teacher` of the run. `dense` names
    modules that stay as they are; `boost` adds averages over so many inputs for what was cut (0: none). `storage` says
    what the device stores. The rest means what it means in `Distill`.
    """

    buys: ClassVar[tuple[str, ...]] = ("latency", "flash", "transfer")

    pattern: PatternName = "auto"
    sparsity: Annotated[float, Gt(0), Lt(1)] | None = None
    allocation: Literal["layer", "global", "owl"] = "layer"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    calibration: Annotated[int, Ge(1)] = 128
    dense: tuple[str, ...] = ()
    masks: Literal["fixed", "gradual", "adaptive"] = "gradual"
    ramp: tuple[float, float] = (0.0, 0.5)
    mask_steps: Annotated[int, Ge(0)] = 0
    mask_decay: Annotated[float, Ge(0)] = 1e-4
    boost: Annotated[int, Ge(0)] = 0
    teacher: Literal["student", "teacher"] = "student"
    storage: Literal["dense", "compressed"] = "dense"
    epochs: Annotated[int, Ge(0)] = 4
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    losses: LossSettings = field(default_factory=_default_losses)
    weight_decay: Annotated[float, Ge(0)] = 0.0
    dropout: Annotated[float, Ge(0), Lt(1)] | None = 0.0

    def _problems(self) -> Iterator[str]:
        pattern = PATTERNS.get(self.pattern)  # what `auto` is, the target says
        if pattern is not None and pattern.is_grouped and self.sparsity not in (None, pattern.sparsity):
            yield (
                f"sparsity must be left out or {pattern.sparsity:g} with the pattern {self.pattern}, "
                f"which has so many zeros, not {self.sparsity!r}"
            )
        if not 0 <= self.ramp[0] <= self.ramp[1] <= 1:
            yield f"ramp must be two shares of the steps between 0 and 1, not {list(self.ramp)!r}"

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with zeros in the pattern; the student given is left as it is.

        Raises:
            ModelError: a matrix does not take the pattern, or shares its weights with another.
            RecipeError: a loss cannot be had for these two models, or training diverged.
        """
        from edgekd.sparsify.stage import sparsify

        return sparsify(self, student, ctx)
