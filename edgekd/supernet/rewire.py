"""Sort a model's parts by importance, so that its sub-networks are prefixes; what it computes stays the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from edgekd.errors import RecipeError
from edgekd.families import arch_of
from edgekd.student import Student
from edgekd.surgery import Importance


def rewire(student: Student, importance: Importance) -> Student:
    """A copy with the heads and neurons of each layer in falling importance; the residual stream stays as it is.

    Hou et al. 2020, "DynaBERT", arXiv 2004.04037.

    Raises:
        RecipeError: operators changed a layer, whose parts may then depend on those of another.
    """
    for layer in student.arch.layers:
        if not layer.plain:
            raise RecipeError(
                f"supernet needs layers as the model's family has them, and layer {layer.source} was changed by "
                "operators: start from a model without them"
            )
    model, family = copy.deepcopy(student.model), student.family
    for index, module in enumerate(family.layers(model)):
        if student.arch.layers[index].heads:
            family.slice_heads(module, _falling(importance.heads[index]), student.arch.head_dim)
        order = _falling(importance.neurons[index])
        family.align(module, order)
        family.slice_neurons(module, order)
    sources = tuple(layer.source for layer in student.arch.layers)
    return replace(student, model=model.eval(), arch=arch_of(model, sources), ordered=True)


def _falling(scores: torch.Tensor) -> torch.Tensor:
    """Indices from the largest score to the smallest; equal scores keep their order."""
    return torch.argsort(scores, descending=True, stable=True)
