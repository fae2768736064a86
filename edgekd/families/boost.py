"""Sparse matrices with a small dense branch beside them that sees sums over neighbouring inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.families.linear import put, rows


class Boosted(nn.Module):
    """A linear layer and its boost: `W x + B (P x)`, `P` summing every `inputs` neighbouring inputs.

    SLoRB of Huang et al. 2025 (AST), arXiv:2407.20584. `W` is `linear`, `B [out, in / inputs]` is `blocks`: both are
    plain linear layers, so that whatever rounds or lowers those goes on with these.
    """

    def __init__(self, linear: nn.Linear, blocks: nn.Linear) -> None:
        super().__init__()
        self.linear, self.blocks = linear, blocks

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.linear.out_features

    @property
    def inputs(self) -> int:
        """How many inputs are summed."""
        return self.in_features // self.blocks.in_features

    @property
    def weight(self) -> Tensor:
        """The one matrix `[out, in]` that computes the same, worked out anew at every call; it has no zeros."""
        return self.linear.weight + self.blocks.weight.repeat_interleave(self.inputs, dim=1)

    @property
    def bias(self) -> Tensor | None:
        """The bias `[out]`, if there is one."""
        return self.linear.bias

    def forward(self, values: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        sums = values.unflatten(-1, (self.blocks.in_features, self.inputs)).sum(-1)  # type: ignore[no-untyped-call]
        outputs: Tensor = self.linear(values) + self.blocks(sums)
        return outputs

    def rows(self, keep: Tensor) -> nn.Module:
        """The same with output features `keep [n]` alone."""
        parts: list[Any] = [rows(self.linear, keep), rows(self.blocks, keep)]
        return Boosted(*parts)

    def columns(self, keep: Tensor) -> nn.Module:
        """Not to be had.

        Raises:
            ModelError: always: the inputs that are summed stand together.
        """
        raise ModelError("a matrix with a boost cannot be made narrower; prune before sparsify")


def described(model: nn.Module) -> dict[str, Any] | None:
    """What `config.json` remembers of the boosts of a model, which `install` takes: None if it has none."""
    names = {name: module.inputs for name, module in model.named_modules() if isinstance(module, Boosted)}
    return {"inputs": next(iter(names.values())), "modules": list(names)} if names else None


def restore(model: nn.Module, remembered: Mapping[str, Any] | None) -> None:
    """Install what `described` has said, in place; nothing if that is None."""
    if remembered is not None:
        install(model, remembered["modules"], remembered["inputs"])


def install(model: nn.Module, names: Sequence[str], inputs: int) -> None:
    """Give the linear layers of these names a boost of zeros, in place.

    Raises:
        ModelError: the inputs of one of them are not a multiple of `inputs`.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    wrong = [f"{name} ({each.in_features})" for name, each in linears.items() if each.in_features % inputs]
    if wrong:
        raise ModelError(
            f"boost sums every {inputs} inputs, and the inputs of {', '.join(wrong[:4])} are not a multiple of that: "
            "choose a boost that divides them, or name them in `dense`"
        )
    for name, linear in linears.items():
        blocks = nn.Linear(linear.in_features // inputs, linear.out_features, bias=False, device="meta")
        blocks.weight = nn.Parameter(torch.zeros(linear.out_features, linear.in_features // inputs))
        put(model, name, Boosted(linear, blocks))
