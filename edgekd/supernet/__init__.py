"""A supernet: one training whose sub-networks of any shape are good. Importing this package does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from edgekd.distill.settings import Taught

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

__all__ = ["Supernet"]


@dataclass(frozen=True, kw_only=True)
class Supernet(Taught):
    """Sort the teacher's parts by importance and train its sub-networks, so that any shape can be sliced out.

    DynaBERT (Hou et al. 2020, arXiv 2004.04037): heads and neurons are sorted once, most important first, measured on
    `examples` training examples; a sub-network of any width is then a prefix, and its depth a fixed,
    evenly spaced choice of layers (`edgekd.supernet.space.evenly`). Every step runs the largest network, the smallest
    and `samples` random ones (the sandwich rule, Yu and Huang 2019, arXiv 1903.05134), each taught by the teacher, and
    adds up their gradients in the weights that they share. AutoDistil (Xu et al. 2022, arXiv 2201.12507) and POA (Zhang
    et al. 2024, arXiv 2408.01031) slice in the same way, but pre-train without a task and without sorting: ADAPT.

    `heads` and `neurons` are the smallest shares of each, `layers` the fewest layers. The residual stream keeps its
    width and its order, so that hidden states compare with the teacher's. The other settings mean what they mean in
    `Distill`. There is no dropout, and batch normalization keeps the teacher's statistics, so that a network gives the
    same answers in training as when it is cut out.
    """

    buys: ClassVar[tuple[str, ...]] = ()

    epochs: Annotated[int, Ge(1)] = 6
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    samples: Annotated[int, Ge(0)] = 2
    heads: Annotated[float, Gt(0), Le(1)] = 0.25
    neurons: Annotated[float, Gt(0), Le(1)] = 0.125
    layers: Annotated[int, Ge(1)] = 2
    examples: Annotated[int, Ge(1)] = 512

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the trained supernet: the student's own shape, parts sorted; the student given is left as it is.

        Raises:
            RecipeError: the student's layers were changed by operators, a loss cannot be had, or training diverged.
        """
        from edgekd.supernet.sandwich import train_supernet

        return train_supernet(self, student, ctx)
