"""Masks on the weights of a model while it is trained: a parametrization of each matrix, in checkpoints like a buffer.

A mask that stands still takes the gradients of the hidden weights away; behind one that adapts they live on (the
straight-through estimator): `y = (w ⊙ m) x`, and the gradient goes to all of `w`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgekd.errors import StageError
from edgekd.sparsify.matrices import flat, unflat, weight_parameter


class Mask(nn.Module):
    """`w -> w ⊙ m`; `adapts`: its mask may change, so that gradients pass as if it were not there."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.adapts = False
        self.kept: Tensor
        self.register_buffer("kept", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weights that count."""
        if not self.adapts:
            return weight * self.kept
        masked: Tensor = _Through.apply(weight, self.kept)  # type: ignore[no-untyped-call]
        return masked


class _Through(torch.autograd.Function):
    """Masks values, and lets gradients pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        return weight * kept

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


@dataclass(frozen=True)
class Masks:
    """The masks of a model's matrices, by the names of the modules."""

    modules: Mapping[str, Any]
    masks: Mapping[str, Mask]

    @classmethod
    def install(cls, modules: Mapping[str, Any]) -> Masks:
        """Put a mask that hides nothing on each of the modules, behind which later parametrizations see zeros."""
        masks = {name: Mask(module.weight) for name, module in modules.items()}
        for name, module in modules.items():
            parametrize.register_parametrization(module, "weight", masks[name])
        return cls(modules, masks)

    def __iter__(self) -> Iterator[tuple[str, nn.Parameter, Mask]]:
        """Name, trained weights and mask of each."""
        return ((name, weight_parameter(self.modules[name]), mask) for name, mask in self.masks.items())

    @property
    def sparsity(self) -> float:
        """The share of weights that are hidden."""
        sizes = [(mask.kept.numel(), int(mask.kept.sum())) for mask in self.masks.values()]
        return 1 - sum(kept for _, kept in sizes) / sum(size for size, _ in sizes)

    def adapt(self, on: bool) -> None:
        """Let the masks change, or stand still."""
        for mask in self.masks.values():
            mask.adapts = on

    @torch.no_grad()
    def put(self, name: str, kept: Tensor, weight: Tensor | None = None) -> None:
        """Set one mask `[D, F]`, and the weights with it."""
        parameter, mask = weight_parameter(self.modules[name]), self.masks[name]
        mask.kept.copy_(unflat(kept, parameter))
        if weight is not None:
            parameter.copy_(unflat(weight, parameter))

    def kept(self, name: str) -> Tensor:
        """One mask as `[D, F]`."""
        return flat(self.masks[name].kept)

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the weights that masks which stand still hide: momentum would move them."""
        for _, parameter, mask in self:
            if not mask.adapts:
                parameter.masked_fill_(~mask.kept, 0.0)

    def decay(self, coefficient: float) -> dict[nn.Parameter, Tensor]:
        """`λ (1 - m) ⊙ w` of every adapting mask: what pulls hidden weights towards zero and leaves the others alone.

        Zhou et al. 2021 (SR-STE), arXiv:2102.04010; annealed as in AST, Huang et al. 2025, arXiv:2407.20584.
        """
        return {
            parameter: coefficient * torch.where(mask.kept, 0.0, parameter.detach())
            for _, parameter, mask in self
            if mask.adapts
        }

    def verify(self) -> None:
        """Refuse to go on where a hidden weight is not zero.

        Raises:
            StageError: names the matrices.
        """
        wrong = [name for name, parameter, mask in self if bool(((parameter != 0) & ~mask.kept).any())]
        if wrong:
            raise StageError(f"masked weights came back to life in {', '.join(wrong[:4])}")

    @torch.no_grad()
    def finish(self) -> None:
        """Take the parametrizations off and leave the weights that count, exact zeros included."""
        for name, module in self.modules.items():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            # Not a product, which would leave -0.0 behind: a sign for a compressor to keep.
            module.weight.masked_fill_(~self.masks[name].kept, 0.0)
