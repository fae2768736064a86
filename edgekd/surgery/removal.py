"""The order in which a model's heads and neurons are best removed, layer by layer, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from edgekd.families.family import Family
from edgekd.student import Student
from edgekd.surgery.obs import Moments, Removal, greedy
from edgekd.surgery.replay import Batch, Stream, features, row_weights, watching, weight_of

CHUNK = 8
"""Neurons that are removed at a time."""
DAMPING = 0.01


def removals(student: Student, batches: Sequence[Batch]) -> Iterator[tuple[Removal, Removal]]:
    """Remove all heads and all neurons of every layer, greedily; see `edgekd.surgery.obs`.

    Yields:
        For each layer, the removal of its heads (of nothing where there are none) and that of its neurons.
    """
    stream = Stream(student.model, student.family, batches)
    for layer in student.family.layers(student.model):
        modules = readers(student, layer)
        sums, outputs = look(student.family, stream, layer, modules)
        yield remove_all(student, modules, sums)
        stream.move(outputs)


def readers(student: Student, layer: nn.Module) -> dict[str, nn.Module]:
    """The matrices of a layer that read its `neurons` and, where it has them, its `heads`."""
    head_input = student.family.head_input(layer)
    found = {"neurons": student.family.neuron_input(layer)}
    return found if head_input is None else {"heads": head_input, **found}


def look(
    family: Family, stream: Stream, layer: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Moments], list[Tensor]]:
    """Sums over the inputs of a layer's `readers`, and what the layer gives for every batch."""
    sums, outputs = {name: Moments() for name in modules}, []
    with ExitStack() as watches, row_weights(family, layer) as weights:
        seen = {name: watches.enter_context(watching(module)) for name, module in modules.items()}
        for call, output in zip(stream.calls, stream.through(layer), strict=True):
            for name, module in modules.items():
                rows = weights.rows(name, call.hidden, output, call.mask)
                sums[name].add(features(module, seen[name].input, call.mask), weights=rows)
            outputs.append(output)
    return sums, outputs


def remove_all(
    student: Student,
    modules: Mapping[str, nn.Module],
    sums: Mapping[str, Moments],
    *,
    heads: int = 1,
    neurons: int = CHUNK,
    damping: float = DAMPING,
) -> tuple[Removal, Removal]:
    """The removal of a layer's heads and of its neurons, so many of them at a time."""
    grams = {name: total.gram(centred=has_bias(modules[name])) for name, total in sums.items()}
    inner = modules["neurons"]
    of_neurons = greedy(weight_of(inner), grams["neurons"], width=patch(inner), chunk=neurons, damping=damping)
    if "heads" not in modules:
        return Removal(torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.float64)), of_neurons
    width, matrix = student.arch.head_dim, weight_of(modules["heads"])
    return greedy(matrix, grams["heads"], width=width, chunk=heads, damping=damping), of_neurons


def patch(module: nn.Module) -> int:
    """Inputs of a matrix for one neuron: 1, or the positions under a convolution's kernel."""
    return module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1


def has_bias(module: nn.Module) -> bool:
    """Whether a constant can be added to what the matrix gives."""
    return isinstance(getattr(module, "bias", None), Tensor)


def step_scores(removal: Removal) -> Tensor:
    """Scores `[G]` whose squares are what each removal added; they rise strictly in the order of removal."""
    if not len(removal.order):
        return torch.zeros(0, dtype=torch.float64)
    rise = (removal.errors[:-1] - removal.errors[1:]).flip(0).clamp(min=0.0)
    scores = torch.zeros(len(rise), dtype=torch.float64)
    scores[removal.order] = (torch.cummax(rise, 0).values + torch.arange(len(rise)) * 1e-12).sqrt()
    return scores
