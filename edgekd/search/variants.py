"""Shapes whose layers compute otherwise, and what that saves: tables of latencies know plain layers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgekd.arch import Arch, Layer
from edgekd.calibrate.shapes import uniform

Reshape = Callable[[Arch], Arch]
KINDS = ("tokens", "shares", "rank", "activation", "norm")
FLOWS = 5
"""Traits that tell what fewer tokens save."""
RIDGE = 1e-4
USUAL = 90
"""The percentile of text lengths that counts as the usual length."""
LAST = 0.2
"""The share of the usual length that leaves the last layer but one, where tokens become fewer from layer to layer."""
MOST = 0.9
"""No more than this share of a plain shape's latency is believed to be saved."""


def plain(arch: Arch) -> Arch:
    """The same widths with every layer as its family has it."""
    layers = (Layer(source=layer.source, heads=layer.heads, neurons=layer.neurons) for layer in arch.layers)
    return replace(arch, layers=tuple(layers))


def variant_of(arch: Arch) -> str:
    """The name of the first of `VARIANTS` that the shape has a trait of; empty for a plain one."""
    kind = next((kind for kind in KINDS if any(getattr(layer, kind) for layer in arch.layers)), "")
    return "padding" if kind == "tokens" and sum(layer.tokens > 1 for layer in arch.layers) == 1 else kind


def kind_of(variant: str) -> str:
    """The kind of change that a variant is; what those of one kind save is learnt together."""
    return "tokens" if variant == "padding" else variant


@dataclass(frozen=True)
class Lengths:
    """Tokens of one example: `most` as the budget states it (0: not known), `usual` that nine of ten texts stay under.

    `usual` is a multiple of 4, at most `most`, and the same where it is not known.
    """

    most: int = 0
    usual: int = 0

    @classmethod
    def of(cls, most: int | None, lengths: Sequence[int] | np.ndarray) -> Lengths:
        """From the budget's sequence and the lengths of some examples."""
        if not most or not len(lengths):
            return cls(most or 0, most or 0)
        usual = int(np.percentile(np.asarray(lengths), USUAL))
        return cls(most, min(most, max(-(-usual // 4) * 4, 4)))


def vary(name: str, arch: Arch, lengths: Lengths) -> Arch:
    """The variant of a shape; the shape itself where it has no such variant.

    Args:
        name: one of `VARIANTS`, or empty for the shape itself.
        arch: a plain shape of an encoder.
        lengths: how many tokens examples have.
    """
    return VARIANTS[name](arch, lengths) if name and arch.layers[0].heads else arch


def _padding(arch: Arch, lengths: Lengths) -> Arch:
    """After the first layer as many tokens as most texts have: padding goes first."""
    return _leaving(arch, [lengths.usual] * len(arch.layers)) if lengths.usual < lengths.most else arch


def _tokens(arch: Arch, lengths: Lengths) -> Arch:
    """Fewer tokens from layer to layer, from the usual length down to a fifth of it."""
    depth = len(arch.layers) - 1
    fall = (LAST - 1) * lengths.usual / max(depth - 1, 1)
    return _leaving(arch, [round(lengths.usual + i * fall) for i in range(depth)])


def _leaving(arch: Arch, counts: Sequence[int]) -> Arch:
    """How many tokens leave each layer but the last; counts below 2 are of no use."""
    layers, left = list(arch.layers), 0
    for i, count in enumerate(counts[: len(layers) - 1]):
        if count > 1 and (not left or count < left):
            layers[i], left = replace(layers[i], tokens=count), count
    return replace(arch, layers=tuple(layers))


def _shares(arch: Arch, lengths: Lengths) -> Arch:
    """Every second layer takes the attention of the one before, with as many heads."""
    layers = list(arch.layers)
    for i in range(1, len(layers), 2):
        heads = min(layers[i - 1].heads, layers[i].heads)
        layers[i - 1] = replace(layers[i - 1], heads=heads)
        layers[i] = replace(layers[i], heads=heads, shares=True)
    return replace(arch, layers=tuple(layers))


def _rank(arch: Arch, lengths: Lengths) -> Arch:
    """All matrices of a rank of about a third of the residual stream."""
    rank = max(arch.hidden // 3 // 8 * 8, 1)
    return _changed(arch, lambda i: {"rank": rank})


VARIANTS: Mapping[str, Callable[[Arch, Lengths], Arch]] = {
    "padding": _padding,
    "tokens": _tokens,
    "shares": _shares,
    "rank": _rank,
    "activation": lambda arch, lengths: _changed(arch, lambda i: {"activation": "relu"}),
    "norm": lambda arch, lengths: _changed(arch, lambda i: {"norm": "affine"}),
}
"""Ways to change how an encoder's layers compute: (shape, lengths) to the changed shape."""


Costs = Callable[[Arch], np.ndarray]
"""A plain shape to the fixed, attention and inner cost of its layers [L, 3] in milliseconds, as a table has them."""


@dataclass(frozen=True)
class Saving:
    """What a change of operators saves in milliseconds: a linear function of `traits`."""

    weights: tuple[float, ...]
    sequence: int | None = None

    def __call__(self, before: Arch, after: Arch, costs: Costs) -> float:
        """Milliseconds by which `after` is faster than `before`; below 0 if it is slower."""
        return float(traits(before, after, costs(before), self.sequence) @ np.asarray(self.weights))


def traits(before: Arch, after: Arch, costs: np.ndarray, sequence: int | None) -> np.ndarray:
    """What a saving may depend on: for each kind of change its layers, their heads and their neurons.

    Tokens that are gone save in all layers that they do not reach a share of what these cost: as many as do not enter a
    layer of its fixed cost and attention, and as many as do not leave its attention of all its costs. What choosing
    tokens costs is the trait of their kind.
    """
    found, flow = np.zeros((len(KINDS), 3)), np.zeros(FLOWS)
    entering = 0.0
    for old, new, own in zip(before.layers, after.layers, costs, strict=True):
        leaving = _left_out(new.tokens, sequence) if new.tokens else entering
        flow += np.concatenate([entering * own[:2], leaving * own])
        entering = leaving
        for row, kind in enumerate(KINDS):
            if kind == "tokens":
                found[row, 0] -= float(new.tokens > 1)
            elif getattr(old, kind) != getattr(new, kind):
                found[row] += [1.0, old.heads, old.neurons]
    return np.concatenate([found.reshape(-1), flow])


def fit_saving(
    pairs: Sequence[tuple[Arch, Arch]], saved: Sequence[float], ms: Sequence[float], costs: Costs, sequence: int | None
) -> Saving:
    """Fit what was saved (milliseconds) by pairs of a plain and a changed shape that takes `ms`; errors relative to it.

    Fewer tokens cannot save more than what a layer costs, nor can choosing them save anything; the rest is free.
    """
    from scipy.optimize import lsq_linear

    rows = np.stack([traits(before, after, costs(before), sequence) for before, after in pairs])
    scale = np.abs(rows).max(0)
    used = scale > 0
    bounded = np.arange(rows.shape[1]) >= rows.shape[1] - FLOWS
    bounded[KINDS.index("tokens") * 3] = True
    low = np.where(bounded, 0.0, -np.inf)
    high = np.where(np.arange(len(bounded)) >= len(bounded) - FLOWS, 1.0, np.inf)
    rows = rows[:, used] / scale[used] / np.asarray(ms)[:, None]
    ridge = np.sqrt(RIDGE) * np.eye(int(used.sum()))
    left = np.vstack([rows, ridge])
    right = np.concatenate([np.asarray(saved, dtype=float) / np.asarray(ms), np.zeros(len(ridge))])
    weights = np.zeros(len(used))
    weights[used] = lsq_linear(left, right, (low[used], high[used] * scale[used])).x / scale[used]
    return Saving(tuple(weights.tolist()), sequence)


def probes(arch: Arch) -> list[Arch]:
    """Shapes to time with changed operators: of one, a few and all layers, in widths that tell their parts apart."""
    heads, neurons, depth = arch.layers[0].heads, arch.layers[0].neurons, len(arch.layers)
    widths = [(heads, neurons), (max(heads // 2, 1), max(neurons // 3, 1))]
    widths += [(heads, max(neurons // 8, 1)), (max(heads // 6, 1), max(neurons // 2, 1))]
    shapes = [uniform(arch, min(few, depth), *width) for few in (1, 3) for width in widths]
    shapes += [uniform(arch, depth, max(heads // share, 1), max(neurons // share, 1)) for share in (2, 6)]
    return list(dict.fromkeys(shapes))


def _left_out(tokens: int, sequence: int | None) -> float:
    return max(1.0 - tokens / sequence, 0.0) if tokens and sequence else float(tokens > 0)


def _changed(arch: Arch, change: Callable[[int], Mapping[str, object]]) -> Arch:
    layers = (replace(layer, **change(i)) for i, layer in enumerate(arch.layers))  # type: ignore[arg-type]
    return replace(arch, layers=tuple(layers))
