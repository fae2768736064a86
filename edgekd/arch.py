"""The shape of a model, as plain data: what search chooses, prune cuts to and `config.json` remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from edgekd.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One residual layer.

    `source` is the index of the teacher's layer it comes from, `heads` its attention heads (0 for a convolutional
    layer), `neurons` its inner width: FFN neurons, or the inner channels of a convolutional layer.

    The rest is how an encoder's layer computes; the default of each is what the family itself does. `tokens` is how
    many tokens at most leave its attention (0: all; 1: the first alone, whose query is then the only one computed;
    k: the first and the k-1 that get the most attention). `shares`: its attention probabilities are those of the layer
    before, so it has no query and key. `rank`: its matrices are products of two of this inner size, wherever that
    takes fewer weights. `activation`: the inner activation by its transformers name. `norm`: `affine` for a scale
    and shift per channel instead of LayerNorm.
    """

    source: int
    heads: int
    neurons: int
    tokens: int = 0
    shares: bool = False
    rank: int = 0
    activation: str = ""
    norm: str = ""

    @property
    def plain(self) -> bool:
        """Whether it computes as the family's own layers do."""
        return self == Layer(source=self.source, heads=self.heads, neurons=self.neurons)


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Per-layer shapes of a model of one family.

    `hidden` is the width of the residual stream. A convolutional net has one per stage: `channels` are the widths of
    its embedder and of each stage, and `hidden` is the last of them. `channels` is empty for encoders; in a plan, empty
    means those that the model has.
    """

    family: str
    hidden: int
    head_dim: int
    vocabulary: int
    layers: tuple[Layer, ...]
    channels: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = {**asdict(self), "layers": [_brief(layer) for layer in self.layers]}
        return {key: value for key, value in data.items() if key != "channels" or value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Arch:
        """Read what `to_dict` wrote.

        Raises:
            ModelError: a field is missing or unknown.
        """
        try:
            layers = tuple(Layer(**layer) for layer in data["layers"])
            return cls(**{**data, "layers": layers, "channels": tuple(data.get("channels", ()))})
        except (KeyError, TypeError) as error:
            raise ModelError(f"the 'edgekd.arch' section of config.json is damaged: {error}") from None

    def describe(self) -> str:
        """One line: `4 layers of 384: heads 6/6/5/6, neurons 512/480/512/400`."""
        heads = "/".join(str(layer.heads) for layer in self.layers)
        neurons = "/".join(str(layer.neurons) for layer in self.layers)
        parts = [f"heads {heads}"] if any(layer.heads for layer in self.layers) else []
        parts.append(f"neurons {neurons}")
        for name in _EXTRAS:
            values = [getattr(layer, name) for layer in self.layers]
            if any(values):
                parts.append(f"{name} {'/'.join(_short(value) for value in values)}")
        width = "/".join(map(str, self.channels)) or self.hidden
        return f"{len(self.layers)} layers of {width}: {', '.join(parts)}"


_EXTRAS = tuple(field.name for field in fields(Layer) if field.default is not MISSING)


def _short(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value or "-")


def _brief(layer: Layer) -> dict[str, Any]:
    """A layer without what is as the family has it."""
    return {key: value for key, value in asdict(layer).items() if key not in _EXTRAS or value}
