"""What the operators do to a shape: pure functions, so that search can foresee them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekd.arch import Arch, Layer
    from edgekd.operators import Operators


def reshape(settings: Operators, arch: Arch) -> Arch:
    """The shape with all operators that are asked for; what a shape cannot have is left out."""
    for step in STEPS.values():
        arch = step(settings, arch)
    return arch


def is_encoder(arch: Arch) -> bool:
    """Whether the layers have attention; others keep their operators."""
    return bool(arch.layers) and all(layer.heads for layer in arch.layers)


def first_token(settings: Operators, arch: Arch) -> Arch:
    """The last layer computes the first token alone."""
    if not settings.first_token or not is_encoder(arch):
        return arch
    return replace(arch, layers=(*arch.layers[:-1], replace(arch.layers[-1], tokens=1)))


def tokens(settings: Operators, arch: Arch) -> Arch:
    """Fewer tokens from layer to layer; a layer that would keep all that reach it is left as it is."""
    if not settings.tokens or not is_encoder(arch):
        return arch
    layers, left = [], 0
    for i, layer in enumerate(arch.layers):
        count = settings.tokens[min(i, len(settings.tokens) - 1)]
        falls = count and (not left or count < left)
        layers.append(replace(layer, tokens=count) if falls and layer.tokens != 1 else layer)
        left = count or left
    return replace(arch, layers=tuple(layers))


def share(settings: Operators, arch: Arch) -> Arch:
    """Layers take over the attention of the layer before; for a count, the last that may."""
    if not settings.share or not is_encoder(arch):
        return arch
    if isinstance(settings.share, int):
        return sharing(arch, inner_layers(arch)[-settings.share :])
    return sharing(arch, [i for i in settings.share if may_share(arch, i)])


def may_share(arch: Arch, index: int) -> bool:
    """Whether a layer can use the attention of the one before: as many heads, and all tokens still there."""
    if not 0 < index < len(arch.layers):
        return False
    before, layer = arch.layers[index - 1], arch.layers[index]
    return before.heads == layer.heads and not before.tokens


def inner_layers(arch: Arch) -> list[int]:
    """Layers that may share while first and last have an attention to themselves, as in EchoAtt."""
    return [i for i in range(2, len(arch.layers) - 1) if may_share(arch, i)]


def sharing(arch: Arch, indices: Sequence[int]) -> Arch:
    """The shape in which these layers share."""
    layers = tuple(replace(layer, shares=True) if i in indices else layer for i, layer in enumerate(arch.layers))
    return replace(arch, layers=layers)


def activation(settings: Operators, arch: Arch) -> Arch:
    """Another inner activation in all layers."""
    return _everywhere(arch, lambda layer: replace(layer, activation=settings.activation or layer.activation))


def norm(settings: Operators, arch: Arch) -> Arch:
    """Another normalization in all layers."""
    return _everywhere(arch, lambda layer: replace(layer, norm=settings.norm or layer.norm))


def rank(settings: Operators, arch: Arch) -> Arch:
    """Products of two matrices; see `rank_of`."""
    ratio = settings.rank
    if ratio is None:
        return arch
    return _everywhere(arch, lambda layer: replace(layer, rank=rank_of(layer, arch.hidden, arch.head_dim, ratio)))


def rank_of(layer: Layer, hidden: int, head_dim: int, ratio: float) -> int:
    """The inner size with which all matrices of a layer together have `ratio` times fewer weights.

    ADAPT: PELA gives every matrix a rank of its own, in·out / (ratio·(in + out)); a layer here has one for all.
    """
    width = layer.heads * head_dim
    projections = 2 if layer.shares else 4
    shapes = [(hidden, width)] * projections + [(hidden, layer.neurons)] * 2
    weights, per_rank = sum(a * b for a, b in shapes), sum(a + b for a, b in shapes)
    return max(1, int(weights / (ratio * per_rank)))


def _everywhere(arch: Arch, change: Callable[[Layer], Layer]) -> Arch:
    return replace(arch, layers=tuple(map(change, arch.layers))) if is_encoder(arch) else arch


STEPS: dict[str, Callable[[Operators, Arch], Arch]] = {
    "first_token": first_token,
    "tokens": tokens,
    "share": share,
    "activation": activation,
    "norm": norm,
    "rank": rank,
}
"""The operators by the setting that asks for them, in the order in which they are tried."""

EXACT = ("first_token",)
"""Those after which the model says the same."""
