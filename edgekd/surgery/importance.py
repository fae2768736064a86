"""Activation-based importance of heads, neurons and layers, from forward passes only.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679): absolute activations averaged over the sequence and
L2-aggregated over the samples; a head's score is the L2 norm over its features of the input of the output
projection; a layer's is its block influence, `1 - cos(input, output)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekd.student import Student


@dataclass(frozen=True)
class Importance:
    """Scores per layer: `heads[l] [A]`, `neurons[l] [N]` and `layers [L]`; larger matters more."""

    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]
    layers: torch.Tensor


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `[count]` of the largest scores, ascending, so that a slice keeps the original order."""
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:count]).values


def activation(module: nn.Module, squares: torch.Tensor) -> torch.Tensor:
    """Minitron's score: the activations alone, `[F]`."""
    return squares.sqrt()


def activation_weight(module: nn.Module, squares: torch.Tensor) -> torch.Tensor:
    """Activation norm times that of the outgoing weights (as in Wanda, Sun et al. 2023, arXiv 2306.11695), `[F]`."""
    weight: Any = module.weight
    outgoing: torch.Tensor = weight.detach().float().transpose(0, 1).flatten(1).norm(dim=1)
    return squares.sqrt() * outgoing


CRITERIA: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "activation": activation,
    "activation_weight": activation_weight,
}


@torch.no_grad()
def measure_importance(
    student: Student, batches: Iterable[dict[str, torch.Tensor]], *, criterion: str = "activation_weight"
) -> Importance:
    """Run the batches through the model and score its parts.

    Args:
        student: the model to look at.
        batches: model inputs; `attention_mask` decides which tokens count. `labels` are ignored.
        criterion: a name of `CRITERIA`.
    """
    family, model = student.family, student.model
    layers = family.layers(model)
    sums = _Sums()
    watched: list[tuple[str, nn.Module]] = []
    for i, layer in enumerate(layers):
        watched.append((f"neurons{i}", family.neuron_input(layer)))
        head_input = family.head_input(layer)
        if head_input is not None:
            watched.append((f"heads{i}", head_input))
    handles = [module.register_forward_pre_hook(sums.watch(name)) for name, module in watched]
    handles += [layer.register_forward_hook(sums.influence(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        model.eval()
        for batch in batches:
            sums.mask = batch.get("attention_mask")
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    score, modules = CRITERIA[criterion], dict(watched)
    scored = {name: score(modules[name], squares) for name, squares in sums.squares.items()}
    heads = [
        scored[f"heads{i}"].view(-1, student.arch.head_dim).norm(dim=1) if f"heads{i}" in scored else torch.zeros(0)
        for i in range(len(layers))
    ]
    neurons = tuple(scored[f"neurons{i}"] for i in range(len(layers)))
    influence = torch.tensor([sums.influences[i] / max(sums.counts[i], 1) for i in range(len(layers))])
    return Importance(tuple(heads), neurons, influence)


class _Sums:
    """What the hooks add up: squared sequence means of |x| per feature, and block influence per layer."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.squares: dict[str, torch.Tensor] = {}
        self.influences: dict[int, float] = {}
        self.counts: dict[int, int] = {}

    def watch(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            means = self._sequence_mean(inputs[0].float().abs())
            self.squares[name] = self.squares.get(name, torch.zeros(())) + means.square().sum(dim=0)

        return hook

    def influence(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["x"]
            after = output if isinstance(output, torch.Tensor) else output[-1 if output[0].dim() == 4 else 0]
            if before.shape != after.shape:
                changed = torch.ones(len(after))
            else:
                changed = 1 - torch.cosine_similarity(before.float(), after.float(), dim=1 if before.dim() == 4 else -1)
                changed = (
                    changed.flatten(1).mean(dim=1) if before.dim() == 4 else self._masked_mean(changed[..., None])[:, 0]
                )
            self.influences[index] = self.influences.get(index, 0.0) + float(changed.sum())
            self.counts[index] = self.counts.get(index, 0) + len(changed)

        return hook

    def _sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        return values.mean(dim=(2, 3)) if values.dim() == 4 else self._masked_mean(values)

    def _masked_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over real tokens: `[B, S, F]` -> `[B, F]`."""
        if self.mask is None or self.mask.shape[1] != values.shape[1]:
            return values.mean(dim=1)
        mask = self.mask[..., None].to(values.dtype)
        return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
