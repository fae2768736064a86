"""What makes a head or a neuron important: one function for each criterion.

Each gives, for every layer, scores of its heads `[A]` and of its neurons `[N]`. Their squares are what is lost:
activation energy, curvature of the loss, or error of the layer's output, whatever the criterion measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.student import Student
from edgekd.surgery.gates import Loss, gate_information
from edgekd.surgery.observe import Observation
from edgekd.surgery.removal import patch, removals, step_scores
from edgekd.surgery.replay import Batch, weight_of

Scores = list[tuple[Tensor, Tensor]]
Criterion = Callable[[Student, Sequence[Batch], Observation, Loss | None], Scores]


def magnitude(student: Student, batches: Sequence[Batch], seen: Observation, loss: Loss | None) -> Scores:
    """Norm of the weights that make a part, times that of the weights that read it; no data is looked at."""
    scores: Scores = []
    for layer in student.family.layers(student.model):
        heads, neurons = outgoing(student, layer)
        values, inner = _incoming(student, layer)
        scores.append((_by_head(values, student) * heads, inner * neurons))
    return scores


def activation(student: Student, batches: Sequence[Batch], seen: Observation, loss: Loss | None) -> Scores:
    """Minitron's score (Muralidharan et al. 2024, arXiv 2407.14679): the activations alone."""
    return [(_by_head(heads.sqrt(), student), neurons.sqrt()) for heads, neurons in seen.inputs]


def activation_weight(student: Student, batches: Sequence[Batch], seen: Observation, loss: Loss | None) -> Scores:
    """Activation norm times that of the outgoing weights (as in Wanda, Sun et al. 2023, arXiv 2306.11695)."""
    scores: Scores = []
    for layer, (heads, neurons) in zip(student.family.layers(student.model), seen.inputs, strict=True):
        head_input, neuron_input = student.family.head_input(layer), student.family.neuron_input(layer)
        read = _column_norms(head_input) if head_input is not None else torch.zeros(0)
        scores.append((_by_head(heads.sqrt() * read, student), neurons.sqrt() * _column_norms(neuron_input)))
    return scores


def fisher(student: Student, batches: Sequence[Batch], seen: Observation, loss: Loss | None) -> Scores:
    """The root of the squared gradients of a gate on each part, summed over samples.

    As Michel et al. 2019 (arXiv 1905.10650) and Kwon et al. 2022 (arXiv 2204.09656) put gates. Without a loss it is the
    Fisher information of the model's own predictions: the second derivative of the divergence from what it says
    now, a divergence that itself has no gradient there. Needs no labels.
    """
    return [(heads.sqrt(), neurons.sqrt()) for heads, neurons in gate_information(student, batches, loss)]


def obs(student: Student, batches: Sequence[Batch], seen: Observation, loss: Loss | None) -> Scores:
    """What removing a part adds to the layer's output error after the best update of what is left, its root.

    ZipLM's score (Kurtić, Frantar & Alistarh 2023, arXiv 2302.04089): parts are removed greedily, heads one at a time,
    neurons by eights, and what goes later never scores less.
    """
    return [(step_scores(heads), step_scores(neurons)) for heads, neurons in removals(student, batches)]


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "activation": activation,
    "activation_weight": activation_weight,
    "fisher": fisher,
    "obs": obs,
}
DEFAULT = "activation"
"""The best of these for a cut that is not reconstructed (`bench/pruning_criteria.py`), and cheap."""


def outgoing(student: Student, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Norms of the weights that read each head `[A]` and each neuron `[N]`."""
    head_input = student.family.head_input(layer)
    heads = _by_head(_column_norms(head_input), student) if head_input is not None else torch.zeros(0)
    return heads, _column_norms(student.family.neuron_input(layer))


def _column_norms(module: nn.Module) -> Tensor:
    """`[F]`: norms of what reads each input feature, or each input channel of a convolution."""
    squares = weight_of(module).square().sum(0)
    return squares.view(-1, patch(module)).sum(1).sqrt().float()


def _incoming(student: Student, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Norms of the weights and biases that make each feature of the heads `[A * head_dim]` and each neuron `[N]`.

    Raises:
        ModelError: it is not known what makes the neurons.
    """
    family = student.family
    if family.places is not None:
        attention = layer.get_submodule(family.places.attention)
        values = _row_norms(attention.get_submodule(family.places.qkv[2]))
        return values, _row_norms(layer.get_submodule(family.places.up))
    made = None
    for module in layer.modules():
        if module is family.neuron_input(layer):
            break
        made = module if isinstance(module, nn.BatchNorm2d) else made
    if made is None or made.num_features != family.neurons(layer):
        raise ModelError(f"the criterion 'magnitude' does not know {family.name} layers; choose another one")
    return torch.zeros(0), (made.weight.detach().square() + made.bias.detach().square()).sqrt()


def _row_norms(module: nn.Module) -> Tensor:
    squares = weight_of(module).square().sum(1)
    bias: Any = getattr(module, "bias", None)
    return (squares if bias is None else squares + bias.detach().double().square()).sqrt().float()


def _by_head(values: Tensor, student: Student) -> Tensor:
    """L2 norms over the features of each head: `[A * head_dim]` -> `[A]`."""
    return values.view(-1, student.arch.head_dim).norm(dim=1) if len(values) else values
