"""Student architecture search: the shape that fits the budget and keeps most of the teacher.

Importing this package does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from edgekd.errors import RecipeError

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

__all__ = ["Search"]

Variant = Literal["padding", "tokens", "shares", "rank", "activation", "norm"]
_AT_LEAST = {
    "samples": 1, "min_layers": 1, "checks": 0, "hidden_step": 0, "head_step": 1, "neuron_step": 1, "trials": 0,
    "population": 2, "jobs": 1, "exhaustive_limit": 0, "finalists": 0, "finalist_steps": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Search:
    """Choose layers, heads and neurons per layer that meet the latency budget; prune cuts them afterwards.

    Shapes are proposed by `strategy` and scored without training by `proxy` on `samples` training examples: `greedy`
    (layers dropped one by one, widths uniform or by importance), `allocate` (widths by error curves), `evolution`
    (NSGA-II over `trials` shapes in generations of `population`, `jobs` processes), `exhaustive` (all shapes, at most
    `exhaustive_limit`), or `auto`: all shapes if so few, else greedy, allocate and, with `trials`, evolution.

    Widths change by `head_step` and `neuron_step` (unset: read from the latency table) and `hidden_step` (0: the
    residual stream stays); `min_layers` bounds the depth, `variants` are changes of operators to consider (unset: for
    texts on a target that is timed, `padding` and `tokens`, which drop tokens after the first layer; how many is read
    from the lengths of the training texts). The best `finalists` shapes and the checkpoints `init` are distilled
    shortly against each other, `finalist_steps` in all. `margin` is how far below the budget to aim. What is chosen is
    built and measured, and corrected by what was seen, at most `checks` times. `table` names a latency table of
    `edgekd calibrate`; without it the target's own in `profiles/` is used if it holds here and covers the teacher, else
    about ten shapes are measured.
    """

    buys: ClassVar[tuple[str, ...]] = ()

    strategy: Literal["auto", "exhaustive", "evolution", "greedy", "allocate"] = "auto"
    proxy: Literal["kl", "diswot", "activation", "fisher", "fisher_kl"] = "fisher_kl"
    samples: int = 256
    margin: float = 0.04
    head_step: Annotated[int, Ge(1)] | None = None
    neuron_step: Annotated[int, Ge(1)] | None = None
    hidden_step: int = 0
    min_layers: int = 1
    exhaustive_limit: int = 64
    trials: int = 0
    population: int = 24
    jobs: int = 1
    variants: list[Variant] | None = None
    finalists: int = 4
    finalist_steps: int = 1200
    init: list[str] = field(default_factory=list)
    checks: int = 6
    table: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            RecipeError: a value is out of range.
        """
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name} must be at least {least}, not {value!r}")
        if not 0 <= self.margin < 0.5:
            raise RecipeError(f"margin must be between 0 and 0.5, not {self.margin!r}")
        if self.strategy == "evolution" and not self.trials:
            raise RecipeError("the strategy evolution needs trials: say how many shapes to look at")

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with the chosen shape as its plan; its weights are not touched.

        If one of the checkpoints of `init` wins, that one is returned instead.

        Raises:
            BudgetError: even the smallest shape misses the budget.
        """
        from edgekd.search.strategy import choose

        return choose(self, student, ctx)
