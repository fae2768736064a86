"""The layers whose weights are quantized, what goes into them, and how far rounding moves them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import DataError
from edgekd.student import Student

Batch = Mapping[str, Tensor]


@dataclass
class Inputs:
    """What goes into a layer: the sum of outer products `[K, K]` and of the rows themselves `[K]`, over `rows` rows."""

    products: Tensor
    total: Tensor
    rows: int = 0

    @property
    def mean(self) -> Tensor:
        """The mean input `[K]`."""
        return self.total / max(self.rows, 1)

    @property
    def second(self) -> Tensor:
        """The mean outer product `[K, K]`: the Hessian of the layer's squared output error, but for a factor."""
        return self.products / max(self.rows, 1)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def copied(student: Student) -> Student:
    """The same student around a copy of its model, whose weights may be changed."""
    return student.with_model(copy.deepcopy(student.model))


@torch.no_grad()
def take_back(changed: nn.Module, original: nn.Module, modules: Collection[str]) -> None:
    """Give linear layers of `changed` the weights and biases of `original` again, in place."""
    for name, new, old in changed_layers(changed, original):
        if name in modules:
            new.load_state_dict(old.state_dict())


@torch.no_grad()
def observe_inputs(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Inputs]:
    """Statistics of what goes into every linear layer, padding left out.

    Raises:
        DataError: there are no batches, or an input of a layer is not finite.
    """
    if not batches:
        raise DataError("fitting weights needs training examples, and there are none")
    found: dict[str, Inputs] = {}
    masks: list[Tensor | None] = [None]
    with ExitStack() as hooks:
        for name, layer in linear_layers(model).items():
            found[name] = Inputs(torch.zeros(layer.in_features, layer.in_features), torch.zeros(layer.in_features))
            hooks.callback(layer.register_forward_pre_hook(_adding(found[name], name, masks)).remove)
        for batch in batches:
            given = {key: value for key, value in batch.items() if key != "labels"}
            masks[0] = given.get("attention_mask")
            model.eval()(**given)
    return found


def _adding(into: Inputs, name: str, masks: list[Tensor | None]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, mask = inputs[0].detach().float(), masks[0]
        if mask is not None and rows.dim() == 3 and rows.shape[:2] == mask.shape:
            rows = rows[mask.bool()]
        rows = rows.reshape(-1, rows.shape[-1])
        if not bool(torch.isfinite(rows).all()):
            raise DataError(f"what goes into {name} is not finite on calibration data: look for NaN in data or weights")
        into.products += rows.T @ rows
        into.total += rows.sum(0)
        into.rows += len(rows)

    return hook


def changed_layers(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, nn.Linear, nn.Linear]]:
    """The linear layers of a model and of its copy, side by side."""
    others = linear_layers(after)
    for name, layer in linear_layers(before).items():
        yield name, layer, others[name]


def channel_scales(weight: Tensor, bits: int = 8) -> Tensor:
    """One scale for every output `[N, 1]`: max|w| / (2^(bits-1) - 1), as the graph's quantizer finds it again."""
    scales = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def rounded(weight: Tensor, bits: int = 8) -> Tensor:
    """Weights `[N, K]` as symmetric rounding per output leaves them."""
    scales = channel_scales(weight, bits)
    return torch.round(weight / scales) * scales
