"""A shape from settings: which layers to keep, how many heads and neurons, and how wide the hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgekd.arch import Arch
from edgekd.errors import RecipeError


def plan_from_settings(
    arch: Arch,
    layers: Sequence[int] | None,
    heads: int | Sequence[int] | None,
    neurons: int | Sequence[int] | None,
    hidden: int | None = None,
) -> Arch:
    """The shape that the settings state, checked against the model's own.

    Raises:
        RecipeError: a layer that is not there, a list of the wrong length, more heads, neurons or hidden channels than
            there are, or a hidden size for a convolutional net, which has one for each stage.
    """
    kept = list(range(len(arch.layers))) if layers is None else list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(arch.layers):
        raise RecipeError(f"layers must be ascending indices below {len(arch.layers)}, each once, not {layers!r}")
    if hidden is not None and arch.channels:
        raise RecipeError("hidden is for encoders: a convolutional net has a width for each stage; leave it out")
    if hidden is not None and not 1 <= hidden <= arch.hidden:
        raise RecipeError(f"hidden must be between 1 and {arch.hidden}, not {hidden!r}")
    own = [arch.layers[i] for i in kept]
    head_counts = _per_layer("heads", heads, [layer.heads for layer in own])
    neuron_counts = _per_layer("neurons", neurons, [layer.neurons for layer in own])
    shapes = zip(own, head_counts, neuron_counts, strict=True)
    cut = tuple(replace(layer, heads=h, neurons=n) for layer, h, n in shapes)
    return replace(arch, layers=cut, hidden=arch.hidden if hidden is None else hidden)


def _per_layer(name: str, asked: int | Sequence[int] | None, own: list[int]) -> list[int]:
    if asked is None:
        return own
    counts = [asked] * len(own) if isinstance(asked, int) else list(asked)
    if len(counts) != len(own):
        raise RecipeError(f"{name} has {len(counts)} entries, but {len(own)} layers are kept")
    for count, most in zip(counts, own, strict=True):
        if not min(most, 1) <= count <= most:
            raise RecipeError(f"{name} must be between {min(most, 1)} and {most} in each kept layer, not {asked!r}")
    return counts
