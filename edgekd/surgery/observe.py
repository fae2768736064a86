"""What plain forward passes tell of a model: activations, the influence of layers, and what its norms give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.student import Student
from edgekd.surgery.replay import Batch, hidden_name, hidden_of, without_labels

Hook = Callable[..., None]


class Observation:
    """Squared sequence means of |x| over real tokens, summed over samples, as Minitron does it.

    `heads[l] [A * head_dim]` and `neurons[l] [N]` are of the inputs of the matrices that read them, `norms[path] [D]`
    of what the norms give. `influence [L]` is the mean of `1 - cos(input, output)`.
    """

    def __init__(self, depth: int) -> None:
        self.mask: Tensor | None = None
        self.heads = {layer: torch.zeros(0) for layer in range(depth)}
        self.neurons = {layer: torch.zeros(0) for layer in range(depth)}
        self.norms: dict[str, Tensor] = {}
        self.samples = 0
        self.influence = torch.zeros(depth)

    @property
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """Heads and neurons of every layer."""
        return list(zip(self.heads.values(), self.neurons.values(), strict=True))

    @property
    def hidden(self) -> Tensor | None:
        """Minitron's score of the residual channels `[D]`: the sum over all norms in the layers."""
        return torch.stack([each.sqrt() for each in self.norms.values()]).sum(0) if self.norms else None

    def count_input(self, into: dict[int, Tensor], index: int) -> Hook:
        """A forward pre-hook that adds up what goes into a module."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = self._squares(inputs[0])
            into[index] = into[index] + squares if len(into[index]) else squares

        return hook

    def count_output(self, name: str) -> Hook:
        """A forward hook that adds up what comes out of a module."""

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.norms[name] = self.norms.get(name, torch.zeros(())) + self._squares(output)

        return hook

    def compare(self, index: int) -> Hook:
        """A forward hook that adds up how much a layer turns the hidden state."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = args[0] if args else kwargs[hidden_name(kwargs)], hidden_of(output)
            self.influence[index] += float(self._turned(before.float(), after.float()).sum())

        return hook

    def _squares(self, values: Tensor) -> Tensor:
        """`[F]`: squared means over each sample's tokens or pixels, summed over samples."""
        values = values.float().abs()
        means = values.mean(dim=(2, 3)) if values.dim() == 4 else self._mean(values)
        return means.square().sum(dim=0)

    def _turned(self, before: Tensor, after: Tensor) -> Tensor:
        """`1 - cos`, mean of each sample `[B]`; 1 where the shape changes."""
        if before.shape != after.shape:
            return torch.ones(len(after))
        if before.dim() == 4:
            return (1 - torch.cosine_similarity(before, after, dim=1)).flatten(1).mean(dim=1)
        return self._mean((1 - torch.cosine_similarity(before, after, dim=-1))[..., None])[:, 0]

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over real tokens: `[B, S, F]` -> `[B, F]`."""
        if self.mask is None or self.mask.shape[1] != values.shape[1]:
            return values.mean(dim=1)
        mask = self.mask[..., None].to(values.dtype)
        return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@torch.no_grad()
def observe(student: Student, batches: Sequence[Batch]) -> Observation:
    """Run all batches through the model once."""
    model = student.model.eval()
    found = Observation(len(student.arch.layers))
    with _hooked(student, found):
        for batch in batches:
            found.mask = batch.get("attention_mask")
            model(**without_labels(batch))
            found.samples += len(next(iter(batch.values())))
    found.influence /= max(found.samples, 1)
    return found


@contextmanager
def _hooked(student: Student, found: Observation) -> Iterator[None]:
    family = student.family
    with ExitStack() as hooks:
        for i, layer in enumerate(family.layers(student.model)):
            head_input = family.head_input(layer)
            if head_input is not None:
                hooks.callback(head_input.register_forward_pre_hook(found.count_input(found.heads, i)).remove)
            neuron_input = family.neuron_input(layer)
            hooks.callback(neuron_input.register_forward_pre_hook(found.count_input(found.neurons, i)).remove)
            for path in family.norms(layer):
                norm = layer.get_submodule(path)
                hooks.callback(norm.register_forward_hook(found.count_output(f"{i}.{path}")).remove)
            hooks.callback(layer.register_forward_hook(found.compare(i), with_kwargs=True).remove)
        yield
