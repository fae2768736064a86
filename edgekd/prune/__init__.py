"""Structured pruning: cut the model to the shape that search chose. Importing this package does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgekd.errors import RecipeError, unknown

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

CRITERIA = ("magnitude", "activation", "activation_weight", "fisher", "obs")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Keep the most important heads, neurons and hidden channels of each kept layer; the weights get smaller.

    `criterion` tells what is important, measured on `samples` training examples; `reconstruct` then fits what is left
    to the uncut layers (ZipLM, Kurtić, Frantar & Alistarh 2023, arXiv 2302.04089); both defaults are what
    `bench/pruning_criteria.py` found best before training. Without a plan from search, `layers`
    (indices to keep), `heads` and `neurons` (a count for all layers, or one per kept layer) and `hidden` state the
    shape. With more than one of `rounds` the shape is reached in steps with `epochs_per_round` of distillation after
    each but the last (see `edgekd.prune.rounds`). An ordered student is cut to its prefix at once.
    """

    buys: ClassVar[tuple[str, ...]] = ("latency", "size")

    criterion: str = "obs"
    samples: int = 512
    reconstruct: bool = True
    layers: list[int] | None = None
    heads: int | list[int] | None = None
    neurons: int | list[int] | None = None
    hidden: int | None = None
    rounds: int = 1
    epochs_per_round: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            RecipeError: unknown criterion, or a count below 1.
        """
        if self.criterion not in CRITERIA:
            raise RecipeError(unknown("criterion", self.criterion, CRITERIA))
        for name in ("samples", "rounds", "epochs_per_round"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)!r}")

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the smaller student; the one given is left as it is.

        Raises:
            RecipeError: there is neither a plan nor a shape in the settings, or the shape does not fit the model.
        """
        from edgekd.prune.rounds import prune

        return prune(self, student, ctx)


__all__ = ["CRITERIA", "Prune"]
