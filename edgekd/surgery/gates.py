"""Gradients with respect to a gate on every head and neuron."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.student import Student
from edgekd.surgery.replay import Batch, without_labels

Loss = Callable[[Any, Batch], Tensor]
EXACT_CLASSES = 8
"""Up to so many classes the information is computed exactly, beyond from as many random projections."""


def gate_information(student: Student, batches: Sequence[Batch], loss: Loss | None) -> list[tuple[Tensor, Tensor]]:
    """For every layer, squared gradients of its heads' gates `[A]` and its neurons' `[N]`, summed over samples.

    Args:
        student: the model; its heads and neurons are multiplied by gates of 1, one of each for every sample.
        batches: model inputs.
        loss: `(model, batch)` to the losses `[B]` of the samples, or to their sum. None: the Fisher information of
            the model's own predictions.
    """
    depth = len(student.arch.layers)
    heads, neurons = [torch.zeros(0)] * depth, [torch.zeros(0)] * depth
    student.model.eval()
    for batch in batches:
        with torch.enable_grad(), _gated(student) as gates:
            if loss is None:
                values = predictions(student.model(**without_labels(batch)).logits.float())
            else:
                values = [loss(student.model, batch).sum()]
            for value in values:
                grads = torch.autograd.grad(value, [gate for _, _, gate in gates], retain_graph=True)
                for (into, layer, _), grad in zip(gates, grads, strict=True):
                    target = heads if into == "heads" else neurons
                    squares = grad.flatten(1).square().sum(0)
                    target[layer] = squares + target[layer] if len(target[layer]) else squares
    return list(zip(heads, neurons, strict=True))


def predictions(logits: Tensor) -> list[Tensor]:
    """Scalars whose squared gradients add up to the Fisher information of the classes that logits `[B, C]` predict.

    With `p` the probabilities it is `Σ_c p_c (∇ log p_c)²`: one scalar for each class, `√p_c log p_c` with `p` held.
    For many classes `Σ_c ±√p_c log p_c` with random signs has the same expectation. One logit alone is a
    regression, whose information is the squared gradient of the answer.
    """
    if logits.shape[1] == 1:
        return [logits.sum()]
    log = logits.log_softmax(-1)
    parts = log.detach().exp().sqrt() * log
    if logits.shape[1] <= EXACT_CLASSES:
        return list(parts.sum(0))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (EXACT_CLASSES, *parts.shape), generator=generator) * 2 - 1
    return [(parts * sign).sum() / EXACT_CLASSES**0.5 for sign in signs.to(parts.device)]


@contextmanager
def _gated(student: Student) -> Iterator[list[tuple[str, int, Tensor]]]:
    """Put gates before the matrices that read heads and neurons; they are there once the model has run."""
    family, gates = student.family, list[tuple[str, int, Tensor]]()
    with ExitStack() as hooks:
        for i, layer in enumerate(family.layers(student.model)):
            head_input = family.head_input(layer)
            if head_input is not None:
                hook = _gate(gates, "heads", i, student.arch.head_dim)
                hooks.callback(head_input.register_forward_pre_hook(hook).remove)
            hook = _gate(gates, "neurons", i, 1)
            hooks.callback(family.neuron_input(layer).register_forward_pre_hook(hook).remove)
        yield gates


def _gate(gates: list[tuple[str, int, Tensor]], kind: str, layer: int, width: int) -> Callable[..., tuple[Tensor]]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        values = inputs[0].detach() if not inputs[0].requires_grad else inputs[0]
        axis = 1 if values.dim() == 4 else values.dim() - 1
        shape = [len(values)] + [1] * (values.dim() - 1)
        shape[axis] = values.shape[axis] // width
        gate = torch.ones(shape, dtype=values.dtype, device=values.device, requires_grad=True)
        gates.append((kind, layer, gate))
        return (values * gate.repeat_interleave(width, dim=axis),)

    return hook
