"""Shapes whose layers compute otherwise, and what that saves: tables of latencies know plain layers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgekd.arch import Arch, Layer
from edgekd.calibrate.shapes import uniform

Reshape = Callable[[Arch], Arch]
KINDS = ("tokens", "shares", "rank", "activation", "norm")
RIDGE = 1e-4
MOST = 0.9
"""No more than this share of a plain shape's latency is believed to be saved."""


def plain(arch: Arch) -> Arch:
    """The same widths with every layer as its family has it."""
    layers = (Layer(source=layer.source, heads=layer.heads, neurons=layer.neurons) for layer in arch.layers)
    return replace(arch, layers=tuple(layers))


def variant_of(arch: Arch) -> str:
    """The name of the first of `VARIANTS` that the shape has a trait of; empty for a plain one."""
    return next((kind for kind in KINDS if any(getattr(layer, kind) for layer in arch.layers)), "")


def vary(name: str, arch: Arch, sequence: int | None) -> Arch:
    """The variant of a shape; the shape itself where it has no such variant.

    Args:
        name: one of `VARIANTS`, or empty for the shape itself.
        arch: a plain shape of an encoder.
        sequence: tokens of one example; None where that is not known.
    """
    return VARIANTS[name](arch, sequence or 0) if name and arch.layers[0].heads else arch


def _tokens(arch: Arch, sequence: int) -> Arch:
    """From the middle on, half of the tokens."""
    middle = len(arch.layers) // 2
    kept = sequence // 2
    return _changed(arch, lambda i: {"tokens": kept} if i >= middle else {}) if middle and kept > 1 else arch


def _shares(arch: Arch, sequence: int) -> Arch:
    """Every second layer takes the attention of the one before, with as many heads."""
    layers = list(arch.layers)
    for i in range(1, len(layers), 2):
        heads = min(layers[i - 1].heads, layers[i].heads)
        layers[i - 1] = replace(layers[i - 1], heads=heads)
        layers[i] = replace(layers[i], heads=heads, shares=True)
    return replace(arch, layers=tuple(layers))


def _rank(arch: Arch, sequence: int) -> Arch:
    """All matrices of a rank of about a third of the residual stream."""
    rank = max(arch.hidden // 3 // 8 * 8, 1)
    return _changed(arch, lambda i: {"rank": rank})


VARIANTS: Mapping[str, Callable[[Arch, int], Arch]] = {
    "tokens": _tokens,
    "shares": _shares,
    "rank": _rank,
    "activation": lambda arch, sequence: _changed(arch, lambda i: {"activation": "relu"}),
    "norm": lambda arch, sequence: _changed(arch, lambda i: {"norm": "affine"}),
}
"""Ways to change how an encoder's layers compute: (shape, tokens) to the changed shape."""


@dataclass(frozen=True)
class Saving:
    """What a change of operators saves in milliseconds: a linear function of `traits`."""

    weights: tuple[float, ...]
    sequence: int | None = None

    def __call__(self, before: Arch, after: Arch) -> float:
        """Milliseconds by which `after` is faster than `before`; below 0 if it is slower."""
        return float(traits(before, after, self.sequence) @ np.asarray(self.weights))


def traits(before: Arch, after: Arch, sequence: int | None) -> np.ndarray:
    """What a saving may depend on, [3 · kinds]: for each kind of change its layers, their heads and their neurons.

    A layer from which fewer tokens leave counts by the share of tokens that are left out.
    """
    found = np.zeros((len(KINDS), 3))
    for old, new in zip(before.layers, after.layers, strict=True):
        for row, kind in enumerate(KINDS):
            if getattr(old, kind) != getattr(new, kind):
                weight = _left_out(new.tokens, sequence) if kind == "tokens" else 1.0
                found[row] += weight * np.asarray([1.0, old.heads, old.neurons])
    return found.reshape(-1)


def fit_saving(pairs: Sequence[tuple[Arch, Arch]], saved: Sequence[float], sequence: int | None) -> Saving:
    """Fit what was saved (milliseconds) by pairs of a plain and a changed shape; ridge on columns of equal size."""
    rows = np.stack([traits(before, after, sequence) for before, after in pairs])
    scale = np.abs(rows).max(0)
    used = scale > 0
    x = rows[:, used] / scale[used]
    weights = np.zeros(rows.shape[1])
    gram = x.T @ x + RIDGE * np.eye(x.shape[1])
    weights[used] = np.linalg.solve(gram, x.T @ np.asarray(saved, dtype=float)) / scale[used]
    return Saving(tuple(weights.tolist()), sequence)


def probes(arch: Arch) -> list[Arch]:
    """Shapes to time with changed operators: one layer and a few, in widths that tell heads and neurons apart."""
    heads, neurons = arch.layers[0].heads, arch.layers[0].neurons
    widths = [(heads, neurons), (max(heads // 2, 1), max(neurons // 3, 1))]
    widths += [(heads, max(neurons // 8, 1)), (max(heads // 6, 1), max(neurons // 2, 1))]
    depths = sorted({min(depth, len(arch.layers)) for depth in (1, 3)})
    return list(dict.fromkeys(uniform(arch, depth, *width) for depth in depths for width in widths))


def _left_out(tokens: int, sequence: int | None) -> float:
    return max(1.0 - tokens / sequence, 0.0) if tokens and sequence else float(tokens > 0)


def _changed(arch: Arch, change: Callable[[int], Mapping[str, object]]) -> Arch:
    layers = (replace(layer, **change(i)) for i, layer in enumerate(arch.layers))  # type: ignore[arg-type]
    return replace(arch, layers=tuple(layers))
