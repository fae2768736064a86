"""The shape of a model, as plain data: what search chooses, prune cuts to and `config.json` remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgekd.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One residual layer.

    `source` is the index of the teacher's layer it comes from, `heads` its attention heads (0 for a convolutional
    layer), `neurons` its inner width: FFN neurons, or the inner channels of a convolutional layer.
    """

    source: int
    heads: int
    neurons: int


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Per-layer shapes of a model of one family."""

    family: str
    hidden: int
    head_dim: int
    vocabulary: int
    layers: tuple[Layer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Arch:
        """Read what `to_dict` wrote.

        Raises:
            ModelError: a field is missing or unknown.
        """
        try:
            layers = tuple(Layer(**layer) for layer in data["layers"])
            return cls(**{**data, "layers": layers})
        except (KeyError, TypeError) as error:
            raise ModelError(f"the 'edgekd.arch' section of config.json is damaged: {error}") from None

    def describe(self) -> str:
        """One line: `4 layers of 384: heads 6/6/5/6, neurons 512/480/512/400`."""
        heads = "/".join(str(layer.heads) for layer in self.layers)
        neurons = "/".join(str(layer.neurons) for layer in self.layers)
        parts = [f"heads {heads}"] if any(layer.heads for layer in self.layers) else []
        return f"{len(self.layers)} layers of {self.hidden}: {', '.join([*parts, f'neurons {neurons}'])}"
