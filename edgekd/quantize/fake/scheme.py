"""What a model is quantized to while it is trained: bits, groups, ranges. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from edgekd.errors import RecipeError, unknown

WEIGHT_BITS = (8, 4, 2)
ACTIVATIONS = ("dynamic", "static", "none")
OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "entropy")
HEAD_BITS = 8
"""Least bits of weights outside of the residual layers (patches, pooler, classifier), which few bits would spoil."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bits and scales of weights and activations.

    `weight_bits` 8 and 4 are symmetric with `group` inputs to a scale (0: one for each output channel); 2 is ternary
    (TWN), one scale for a matrix. Weights outside of the residual layers keep at least 8 bits. `activations` have
    ranges of each example (`dynamic`), ranges that stand (`static`), or stay float (`none`); they are unsigned with a
    zero point, or `symmetric` signed. `attention` adds both operands of the two attention products. `embeddings` has
    the tables in 8 bits with a scale per row, in 4 in groups of 32, or ternary (`embedding_bits`). `keep_float` names
    modules that stay as they are, with all that is within them.
    """

    weight_bits: int = 8
    group: int = 0
    activations: str = "dynamic"
    activation_bits: int = 8
    symmetric: bool = False
    attention: bool = False
    embeddings: bool = False
    embedding_bits: int = 8
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            RecipeError: names the first that is wrong.
        """
        if self.weight_bits not in WEIGHT_BITS:
            raise RecipeError(f"weight_bits must be 8, 4 or 2 (ternary), not {self.weight_bits!r}")
        if self.embedding_bits not in (8, 4, 2):
            raise RecipeError(f"embedding_bits must be 8, 4 or 2 (ternary), not {self.embedding_bits!r}")
        if self.activation_bits not in (8, 16):
            raise RecipeError(f"activation_bits must be 8 or 16, not {self.activation_bits!r}")
        if self.activations not in ACTIVATIONS:
            raise RecipeError(unknown("activations", self.activations, ACTIVATIONS))
        if self.group < 0 or (self.group and self.weight_bits == 2):
            raise RecipeError(f"group must be 0 (one scale per channel) or a number of inputs, not {self.group!r}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "keep_float": list(self.keep_float)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scheme:
        """What `to_dict` wrote.

        Raises:
            RecipeError: a key is unknown.
        """
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise RecipeError(unknown("setting of a quantization scheme", key, names))
        return cls(**{**values, "keep_float": tuple(values.get("keep_float", ()))})


def within(name: str, scopes: Sequence[str]) -> bool:
    """Whether a module is one of these, or a part of one."""
    return any(name == scope or name.startswith(f"{scope}.") for scope in scopes)
