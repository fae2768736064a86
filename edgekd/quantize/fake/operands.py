"""Rounding of what attention multiplies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgekd.distill.attention_tap import OPERANDS, tap
from edgekd.families.encoder import Places
from edgekd.quantize.fake.scheme import within

if TYPE_CHECKING:
    from edgekd.quantize.fake.installed import FakeQuantized


def quantize_attention(
    made: FakeQuantized, layers: Sequence[nn.Module], places: Places, modules: Mapping[str, nn.Module]
) -> list[RemovableHandle]:
    """Round the operands of both products in every layer, whichever implementation computes them."""
    names = {id(module): name for name, module in modules.items()}
    handles = []
    for layer in layers:
        name = f"{names[id(layer)]}.{places.attention}"
        if not within(name, made.scheme.keep_float):
            shares = bool(getattr(getattr(layer, "compact", None), "shares", False))
            handles += tap(layer, _Operands(made, name, shares=shares))
    return handles


class _Operands:
    """Rounds what one layer's attention multiplies; a layer that shares attention has the second product alone."""

    def __init__(self, made: FakeQuantized, name: str, *, shares: bool) -> None:
        self.made, self.name = made, name
        for operand in OPERANDS[2 * shares :]:
            made.add(f"{name}:{operand}")

    def operand(self, name: str, tensor: Tensor) -> Tensor:
        return self.made.round(f"{self.name}:{name}", tensor, 3 if name == "key" else 2)

    def maps(self, probabilities: Tensor) -> None:
        """Nothing to do: they are rounded when they are multiplied."""
