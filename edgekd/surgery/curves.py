"""What every width of every layer costs in accuracy of the layer's output, and what leaving the layer out costs.

The error table of ZipLM (Kurtić, Frantar & Alistarh 2023, arXiv 2302.04089): one greedy pass for each layer gives the
error of all widths, with the best reconstruction of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import DataError, ModelError
from edgekd.student import Student
from edgekd.surgery.importance import Importance
from edgekd.surgery.obs import Moments
from edgekd.surgery.removal import CHUNK, DAMPING, has_bias, look, readers, remove_all, step_scores
from edgekd.surgery.replay import Batch, Stream, real


@dataclass(frozen=True)
class Curves:
    """Errors per layer, in float64.

    `heads[l] [A + 1]` and `neurons[l] [N + 1]`, by how many are kept: `‖WX - ŴX̂‖² / ‖WX‖²` of the matrix that reads
    them (damped, tokens weighted by `RowWeights`, about the mean where it has a bias). It is 0 with all kept, 1 with
    none, and rises as fewer are kept. `head_weights[l]`, `neuron_weights[l]` and `drops[l]` have one unit: the relative
    squared change of the layer's output when attention or the feed-forward network give a constant, or when the
    layer is left out (infinite where it cannot be). `head_order[l] [A]` and `neuron_order[l] [N]` are the orders of
    removal, first removed first; `head_scores` and `neuron_scores` rank the parts accordingly.
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    drops: tuple[float, ...]
    head_weights: tuple[float, ...]
    neuron_weights: tuple[float, ...]
    head_order: tuple[Tensor, ...]
    neuron_order: tuple[Tensor, ...]
    head_scores: tuple[Tensor, ...]
    neuron_scores: tuple[Tensor, ...]

    def error(self, layer: int, heads: int, neurons: int) -> float:
        """The relative squared change of a layer's output at this width, to first order."""
        of_heads = self.head_weights[layer] * float(self.heads[layer][heads])
        return of_heads + self.neuron_weights[layer] * float(self.neurons[layer][neurons])

    def importance(self, hidden: Tensor | None = None) -> Importance:
        """Scores that make a cut keep what the curves were measured for; `hidden [D]` is taken from elsewhere."""
        return Importance(self.head_scores, self.neuron_scores, torch.tensor(self.drops), hidden)


@torch.no_grad()
def layer_errors(
    student: Student,
    batches: Iterable[Batch],
    head_step: int = 1,
    neuron_step: int = CHUNK,
    damping: float = DAMPING,
) -> Curves:
    """Measure the curves of every layer on what it gets in the model as it is.

    Args:
        student: the model; its layers must compute as the family's own do.
        batches: model inputs.
        head_step: heads removed at a time.
        neuron_step: the step in which widths will be chosen; neurons are removed by eights or by this if it is less.
        damping: as for `edgekd.surgery.reconstruct.reconstruct`; it adds a little to the errors.

    Raises:
        ModelError: a layer computes otherwise.
        DataError: there are no batches.
    """
    batches = list(batches)
    if not batches:
        raise DataError("the errors of layers are measured on examples, and there are none: give at least one")
    if not all(layer.plain for layer in student.arch.layers):
        raise ModelError("layers with other operators have no error curves: search before the operators are changed")
    family, model = student.family, student.model
    stream, found = Stream(model, family, batches), []
    for index, layer in enumerate(family.layers(model)):
        modules = readers(student, layer)
        sums, outputs = look(family, stream, layer, modules)
        chunk = min(neuron_step, CHUNK)
        heads, neurons = remove_all(student, modules, sums, heads=head_step, neurons=chunk, damping=damping)
        weights = {name: _without(stream, layer, modules[name], sums[name], outputs) for name in modules}
        before = [call.hidden for call in stream.calls]
        drop = _change(stream, outputs, before) if family.droppable(model, index) else float("inf")
        found.append((heads, neurons, drop, weights.get("heads", 0.0), weights["neurons"]))
        stream.move(outputs)
    every_heads, every_neurons, drops, head_weights, neuron_weights = zip(*found, strict=True)
    return Curves(
        heads=tuple(removal.errors for removal in every_heads),
        neurons=tuple(removal.errors for removal in every_neurons),
        drops=drops,
        head_weights=head_weights,
        neuron_weights=neuron_weights,
        head_order=tuple(removal.order for removal in every_heads),
        neuron_order=tuple(removal.order for removal in every_neurons),
        head_scores=tuple(step_scores(removal) for removal in every_heads),
        neuron_scores=tuple(step_scores(removal) for removal in every_neurons),
    )


def _without(stream: Stream, layer: nn.Module, module: nn.Module, sums: Moments, outputs: list[Tensor]) -> float:
    """How much the layer's output changes when a matrix gives its mean, or nothing where it has no bias."""
    mean: Tensor | None = None
    if has_bias(module):
        mean = module((sums.x / sums.count).float())
    with _constant(module, mean):
        return _change(stream, outputs, stream.through(layer))


@contextmanager
def _constant(module: nn.Module, mean: Tensor | None) -> Iterator[None]:
    """Let a module give the same for every input."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output) if mean is None else mean.expand_as(output)

    replace: Callable[..., Tensor] = hook
    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _change(stream: Stream, outputs: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """`‖y - z‖² / ‖y‖²` over all real tokens."""
    wrong = total = 0.0
    for call, output, other in zip(stream.calls, outputs, others, strict=True):
        kept, changed = real(output, call.mask).double(), real(other, call.mask).double()
        wrong += float((kept - changed).square().sum())
        total += float(kept.square().sum())
    return wrong / max(total, 1e-300)
