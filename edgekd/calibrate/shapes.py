"""Which shapes of a body to time: chains of equal layers, mixed models, and mixed models to be held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from edgekd.arch import Arch, Layer

NEURON_STEP = 32
ATTEMPTS = 200
SHORT, LONG = 2, 5
"""Lengths of the two chains of each width; their difference is the cost of the layers in between."""


def chains(arch: Arch) -> list[Arch]:
    """Chains of equal layers of an encoder: every width of interest at two lengths, and the depths themselves.

    Attention is varied at a quarter of the neurons, neurons at half of the heads.
    """
    heads, neurons = arch.layers[0].heads, arch.layers[0].neurons
    widths = [(h, max(neurons // 4, 1)) for h in _shares(heads, (1, 2, 4, 8))]
    widths += [(max(heads // 2, 1), n) for n in _shares(neurons, (1, 2, 4, 8, 16, 48))]
    deepest = len(arch.layers)
    shapes = [uniform(arch, depth, *width) for width in widths for depth in (min(SHORT, deepest), min(LONG, deepest))]
    shapes += [uniform(arch, depth, max(heads // 2, 1), max(neurons // 4, 1)) for depth in (1, deepest)]
    return list(dict.fromkeys(shapes))


def references(arch: Arch) -> list[Arch]:
    """Three of the shapes above, small to large: beside them all others of a body are timed."""
    if not arch.layers[0].heads:
        return list(dict.fromkeys(_narrowed(arch, share) for share in (8, 2, 1)))
    heads, neurons = max(arch.layers[0].heads // 2, 1), max(arch.layers[0].neurons // 4, 1)
    return list(dict.fromkeys(uniform(arch, depth, heads, neurons) for depth in (SHORT, LONG, len(arch.layers))))


def _narrowed(arch: Arch, share: int) -> Arch:
    return replace(arch, layers=tuple(replace(x, neurons=max(x.neurons // share, 1)) for x in arch.layers))


def short_chains(arch: Arch) -> list[Arch]:
    """About ten shapes, enough to predict one teacher's students near one budget."""
    heads, neurons = arch.layers[0].heads, arch.layers[0].neurons
    widths = [(heads, neurons)]
    widths += [(h, neurons) for h in _shares(heads, (2, 4, 12)) if h < heads]
    widths += [(heads, n) for n in _shares(neurons, (2, 4, 12)) if n < neurons]
    widths += [(max(heads // 2, 1), max(neurons // 3, 1))]
    shapes = [uniform(arch, 2, *width) for width in widths]
    shapes.append(uniform(arch, 1, heads, neurons))
    if len(arch.layers) > 2:
        shapes.append(uniform(arch, min(len(arch.layers), 4), max(heads // 2, 1), max(neurons // 3, 1)))
        shapes.append(uniform(arch, len(arch.layers), heads, neurons))
    return list(dict.fromkeys(shapes))


def convolution_shapes(arch: Arch, droppable: Sequence[bool]) -> list[Arch]:
    """For nets whose layers differ: each layer at half and at an eighth of its width, and without it where possible."""
    shapes = [arch]
    for i, layer in enumerate(arch.layers):
        for width in (layer.neurons // 2, layer.neurons // 8):
            changed = replace(layer, neurons=max(width, 1))
            shapes.append(replace(arch, layers=(*arch.layers[:i], changed, *arch.layers[i + 1 :])))
        if droppable[i]:
            shapes.append(replace(arch, layers=(*arch.layers[:i], *arch.layers[i + 1 :])))
    return list(dict.fromkeys(shapes))


def mixed(arch: Arch, droppable: Sequence[bool], count: int, *, seed: int) -> list[Arch]:
    """Random students of a body: any depth, uniform ones (a third) and ones with a width of its own in every layer.

    Heads are any number, neurons multiples of 32 (of an eighth of the width in convolutional nets). Fewer shapes where
    the body does not have as many.
    """
    rng = random.Random(seed)
    shapes: list[Arch] = []
    for _ in range(ATTEMPTS * count):
        if len(shapes) == count:
            break
        kept = _kept(arch, droppable, rng)
        even = rng.random() < 1 / 3
        share = (rng.random(), rng.random())
        layers = tuple(_drawn(arch.layers[i], *(share if even else (rng.random(), rng.random()))) for i in kept)
        shape = replace(arch, layers=layers)
        if shape not in shapes:
            shapes.append(shape)
    return shapes


def uniform(arch: Arch, depth: int, heads: int, neurons: int) -> Arch:
    """The first `depth` layers, each with at most so many heads and neurons."""
    layers = tuple(
        Layer(source=layer.source, heads=min(heads, layer.heads), neurons=min(neurons, layer.neurons))
        for layer in arch.layers[:depth]
    )
    return replace(arch, layers=layers)


def _kept(arch: Arch, droppable: Sequence[bool], rng: random.Random) -> list[int]:
    fixed = [i for i in range(len(arch.layers)) if not droppable[i]]
    spare = [i for i in range(len(arch.layers)) if droppable[i]]
    fewest = 0 if fixed else 1
    chosen = spare[: rng.randint(fewest, len(spare))] if not fixed else rng.sample(spare, rng.randint(0, len(spare)))
    return sorted(fixed + chosen)


def _drawn(layer: Layer, head_share: float, neuron_share: float) -> Layer:
    step = min(NEURON_STEP, layer.neurons) if layer.heads else max(layer.neurons // 8, 1)
    steps = max(layer.neurons // step, 1)
    heads = 1 + int(head_share * layer.heads) if layer.heads else 0
    return replace(layer, heads=min(heads, layer.heads), neurons=step * min(1 + int(neuron_share * steps), steps))


def _shares(full: int, parts: Sequence[int]) -> list[int]:
    return sorted({max(full // part, 1) for part in parts}, reverse=True)
