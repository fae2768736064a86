"""How much each head, neuron, layer and channel of the residual stream matters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from edgekd.errors import DataError, RecipeError, unknown
from edgekd.student import Student
from edgekd.surgery.criteria import CRITERIA, DEFAULT
from edgekd.surgery.gates import Loss
from edgekd.surgery.observe import observe
from edgekd.surgery.replay import Batch


@dataclass(frozen=True)
class Importance:
    """Scores per layer: `heads[l] [A]`, `neurons[l] [N]`, `layers [L]`, and `hidden [D]`; larger matters more.

    `hidden` scores the channels of the residual stream; it is None where the family cannot narrow it.
    """

    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]
    layers: torch.Tensor
    hidden: torch.Tensor | None = None


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `[count]` of the largest scores, ascending, so that a slice keeps the original order."""
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:count]).values


@torch.no_grad()
def measure_importance(
    student: Student, batches: Iterable[Batch], *, criterion: str = DEFAULT, loss: Loss | None = None
) -> Importance:
    """Run the batches through the model and score its parts.

    Heads and neurons are scored by the criterion. A layer's score is always its block influence, `1 - cos(input,
    output)`, and a residual channel's the sum over all norms in the layers of what they give for it (both Minitron,
    Muralidharan et al. 2024, arXiv 2407.14679). An `ordered` student is sorted already: without looking at data its
    scores fall from the first part to the last, so that cutting keeps prefixes; its layers score the same.

    Args:
        student: the model to look at.
        batches: model inputs; `attention_mask` decides which tokens count. `labels` are for `loss` alone.
        criterion: a name of `CRITERIA`.
        loss: for `fisher`, `(model, batch)` to the losses `[B]` of the samples; see `edgekd.surgery.gates`.

    Raises:
        RecipeError: there is no such criterion.
        DataError: there are no batches.
    """
    if criterion not in CRITERIA:
        raise RecipeError(unknown("criterion", criterion, CRITERIA))
    if student.ordered:
        return in_order(student)
    batches = list(batches)
    if not batches:
        raise DataError("importance is measured on examples, and there are none: give at least one")
    seen = observe(student, batches)
    heads, neurons = zip(*CRITERIA[criterion](student, batches, seen, loss), strict=True)
    return Importance(tuple(heads), tuple(neurons), seen.influence, seen.hidden)


def in_order(student: Student) -> Importance:
    """Scores that fall from the first head and neuron to the last; channels are in no order."""
    layers = student.arch.layers
    return Importance(
        heads=tuple(_falling(layer.heads) for layer in layers),
        neurons=tuple(_falling(layer.neurons) for layer in layers),
        layers=torch.ones(len(layers)),
    )


def _falling(count: int) -> torch.Tensor:
    return torch.arange(count, 0, -1, dtype=torch.float32)
