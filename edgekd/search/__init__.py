"""Student architecture search: the shape that fits the budget and keeps most of the teacher.

Importing this package does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

__all__ = ["Search"]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Choose layers, heads and neurons per layer that meet the latency budget; prune cuts them afterwards.

    Candidates are scored by the KL divergence of their untrained outputs from the teacher's on `samples` training
    examples. `margin` is how far below the budget to aim; `head_step` and `neuron_step` are the sizes in which
    widths are cut; `min_layers` bounds the depth. The chosen shape is built and measured, and the prediction is
    corrected by what was seen, at most `checks` times. `table` names a latency table of `edgekd calibrate`; without it
    the target's own in `profiles/` is used if it holds here and covers the teacher, else about ten shapes are measured.
    """

    samples: int = 256
    margin: float = 0.04
    head_step: int = 1
    neuron_step: int = 32
    min_layers: int = 1
    checks: int = 4
    table: str | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            RecipeError: a value is out of range.
        """
        for name in ("samples", "head_step", "neuron_step", "min_layers"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if not 0 <= self.margin < 0.5:
            raise RecipeError(f"margin must be between 0 and 0.5, not {self.margin!r}")
        if self.checks < 0:
            raise RecipeError(f"checks must be at least 0, not {self.checks!r}")

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with the chosen shape as its plan; its weights are not touched."""
        from edgekd.search.strategy import choose

        return choose(self, student, ctx)
