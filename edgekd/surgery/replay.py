"""Running a model layer by layer over a set of batches, the hidden states between the layers being kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgekd.families.family import Family

Batch = dict[str, torch.Tensor]


class _Reached(Exception):  # noqa: N818 - no error, but the way out of a forward pass
    """The first layer was about to run."""


@dataclass
class _Call:
    """What a layer is called with: the hidden state, where it stands, and everything else."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor | None

    def run(self, layer: nn.Module) -> torch.Tensor:
        if self.args:
            return hidden_of(layer(self.hidden, *self.args[1:], **self.kwargs))
        return hidden_of(layer(**{**self.kwargs, hidden_name(self.kwargs): self.hidden}))


class Stream:
    """The hidden states before some layer, for every batch; starts before the first layer.

    Layers are called with the arguments that the model gives its first one, so this holds for models whose layers
    all get the same ones and hand nothing but the hidden state to each other.
    """

    @torch.no_grad()
    def __init__(self, model: Any, family: Family, batches: Sequence[Batch]) -> None:
        model.eval()
        self.calls: list[_Call] = []
        first = family.layers(model)[0]
        for batch in batches:
            with _stopped(first) as reached:
                try:
                    model(**without_labels(batch))
                except _Reached:
                    args, kwargs = reached[0]
                    hidden = args[0] if args else kwargs[hidden_name(kwargs)]
                    self.calls.append(_Call(hidden, args, kwargs, batch.get("attention_mask")))

    @torch.no_grad()
    def through(self, layer: nn.Module) -> Iterator[torch.Tensor]:
        """What a layer makes of every batch; the states stay where they are."""
        for call in self.calls:
            yield call.run(layer)

    def move(self, hidden: Iterable[torch.Tensor]) -> None:
        """Go on with these hidden states."""
        for call, state in zip(self.calls, hidden, strict=True):
            call.hidden = state

    def advance(self, layer: nn.Module) -> None:
        """Go on to behind this layer."""
        self.move(self.through(layer))


@contextmanager
def _stopped(layer: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """End every forward pass at this layer, and keep what it would have been called with."""
    reached: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield reached
    finally:
        handle.remove()


class Seen:
    """The latest input and output of a module."""

    input: torch.Tensor
    output: torch.Tensor


@contextmanager
def watching(module: nn.Module) -> Iterator[Seen]:
    """Look at what goes into a module and what comes out of it."""
    seen = Seen()

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.input, seen.output = inputs[0], output

    handle = module.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


class RowWeights:
    """How much an error counts at each token: `1 / variance` of the stream that the next norm divides by.

    Without that the few tokens with outliers a hundred times larger than the rest would be all that is fitted, while
    the norm takes their size away. `heads` is behind attention, `neurons` behind the feed-forward network.
    """

    def __init__(self, first: Seen | None = None, second: Seen | None = None) -> None:
        self.first, self.second = first, second

    def rows(
        self, part: str, hidden: torch.Tensor, output: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`[n]` for the real tokens of the batch that just went through; None where the layer has no norms.

        Args:
            part: `heads` or `neurons`.
            hidden: what the layer got.
            output: what it gave.
            mask: which tokens are real.
        """
        if self.first is None or self.second is None:
            return None
        normalizes_input = self.first.input.shape == hidden.shape and torch.equal(self.first.input, hidden)
        after_attention = self.second.input if normalizes_input else self.first.input
        after_all = output if normalizes_input else self.second.input
        stream = real(after_attention if part == "heads" else after_all, mask).double()
        return 1 / (stream.var(dim=-1, correction=0) + 1e-6)


@contextmanager
def row_weights(family: Family, layer: nn.Module) -> Iterator[RowWeights]:
    """Watch a layer for what its errors weigh."""
    paths = family.norms(layer)
    with ExitStack() as watches:
        seen = [watches.enter_context(watching(layer.get_submodule(path))) for path in paths]
        yield RowWeights(*seen[:2])


def without_labels(batch: Batch) -> Batch:
    """What a model takes."""
    return {name: value for name, value in batch.items() if name != "labels"}


def hidden_name(kwargs: dict[str, Any]) -> str:
    """The keyword under which a layer gets the hidden state."""
    return "hidden_states" if "hidden_states" in kwargs else "hidden_state" if "hidden_state" in kwargs else "x"


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in what a layer returns; attention probabilities may stand before it."""
    if isinstance(output, torch.Tensor):
        return output
    found: torch.Tensor = output[-1 if output[0].dim() == 4 else 0]
    return found


def real(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows `[n, F]` of the real tokens of `[B, S, F]`; of all pixels of `[B, F, H, W]`."""
    if values.dim() == 4:
        return values.movedim(1, -1).flatten(0, -2)
    if mask is not None and values.dim() == 3 and mask.shape == values.shape[:2]:
        return values[mask.bool()]
    return values.flatten(0, -2)


def features(module: nn.Module, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows `[n, F]` that a matrix multiplies: real tokens, or the patches under a convolution's kernel."""
    if not isinstance(module, nn.Conv2d):
        return real(values, mask)
    if isinstance(module.padding, str):
        raise ValueError(f"a convolution padded by {module.padding!r} is not unfolded")
    patches = functional.unfold(
        values, module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride
    )
    return patches.movedim(1, -1).flatten(0, -2)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The matrix `[out, F]` of a linear layer, a convolution, or of what stands for one, in float64."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight.detach().double().flatten(1)
    width: Any = module.in_features
    with torch.no_grad():
        probe = next(module.parameters()).new_zeros(width + 1, width)
        probe[:width].fill_diagonal_(1.0)
        answers: torch.Tensor = module(probe)
    return (answers[:width] - answers[width:]).T.double()
