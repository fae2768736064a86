"""Weight-only quantization: integers of 4 or 8 bits in groups, packed as they are into MatMulNBits.

A quantizer decides on the integers; packing must not round again. So weights that a quantizer has chosen are float32
numbers that tell their own grid: every group is a scale times whole numbers without a common factor, the scale has so
few bits that the products are exact, and `read` finds scale and whole numbers again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import ModelError

Weights = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]

WEIGHT_ONLY = {"int8_weights": 8, "int4_weights": 4}
"""Forms whose weights alone are quantized, with their bits."""
DEFAULTS: dict[int, dict[str, Any]] = {8: {"group": 0, "symmetric": True}, 4: {"group": 32, "symmetric": False}}
"""By bits; with 4 of them a zero point halves the divergence from the float model."""
NEAREST = "nearest"
HEAD_BITS = 8
ROW_BLOCK = 128
"""Blocks that a row is cut into for the operator, where all of the row has one scale."""
LEAST_BLOCK = 16
SCALE_BITS = 16
"""Bits of a scale's significand: its product with an integer of 8 bits is then exact in float32."""
ACCURACY_LEVEL = 4
"""MatMulNBits rounds activations to 8 bits, block by block, and multiplies integers; 1 would compute in float32."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the weights of linear layers are rounded.

    `group` inputs of a row share one scale, 0: the whole row. `symmetric` grids have whole numbers from -(2^(bits-1)-1)
    to the same above zero; the others 2^bits of them around any zero point.
    """

    bits: int
    group: int
    symmetric: bool = True
    accuracy_level: int = ACCURACY_LEVEL

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`."""
        return asdict(self)


TABLE_GRID = Grid(bits=4, group=32)
"""Of embedding tables in 4 bits."""


@dataclass(frozen=True)
class Blocks:
    """The whole numbers of a matrix `[N, K]`, without a common factor in any group, scales and zero points `[N, G]`.

    `steps` are relative to the zero point: a weight is `scale * step`. `width` inputs share a scale.
    """

    steps: Integers
    scales: Weights
    zeros: Integers
    width: int

    def values(self) -> Weights:
        """The weights `[N, K]`, exact."""
        scales = np.repeat(self.scales, self.width, axis=1)[:, : self.steps.shape[1]]
        return np.asarray(self.steps * scales, np.float32)


def grid_of_form(form: str, weights: Mapping[str, Any] | None = None) -> tuple[Grid, bool]:
    """The grid of a weight-only form, and whether a quantizer has put the weights on it already.

    Args:
        form: a name of `WEIGHT_ONLY`.
        weights: what a student remembers: the fields of `Grid`, and the `method` that chose the integers.
    """
    told = dict(weights or {})
    chosen = told.pop("method", NEAREST) != NEAREST
    bits = WEIGHT_ONLY[form]
    return Grid(**{"bits": bits, **DEFAULTS[bits], **told}), chosen


def grid_of_module(grid: Grid, module: str) -> Grid:
    """The grid of one layer: what is not in the repeated layers (pooler, classifier) keeps 8 bits."""
    repeated = any(part.isdigit() for part in module.split("."))
    return grid if repeated or grid.bits >= HEAD_BITS else replace(grid, bits=HEAD_BITS, **DEFAULTS[HEAD_BITS])


def group_width(grid: Grid, inputs: int) -> int:
    """Inputs that share a scale in a row of so many."""
    return min(grid.group, inputs) if grid.group else inputs


def short(scales: npt.NDArray[Any]) -> Weights:
    """Positive scales rounded to `SCALE_BITS` significant bits, so that products with integers are exact."""
    fraction, exponent = np.frexp(scales.astype(np.float64))
    return np.asarray(np.ldexp(np.round(fraction * 2**SCALE_BITS) / 2**SCALE_BITS, exponent), np.float32)


def nearest(weight: Weights, grid: Grid) -> Blocks:
    """Round to the nearest: the range of every group of `[N, K]` decides on its scale.

    Raises:
        ModelError: a weight is not finite.
    """
    if not np.isfinite(weight).all():
        raise ModelError("a matrix has weights that are not finite; the model is broken, train it again")
    scales, zeros = grid_of(weight, grid)
    return round_to(weight, scales, zeros, grid)


def grid_of(weight: Weights, grid: Grid) -> tuple[Weights, Integers]:
    """Scales and zero points `[N, G]` by the range of every group of `[N, K]`."""
    blocks = _grouped(weight, grid)
    if grid.symmetric:
        scales = np.abs(blocks).max(axis=2) / (2 ** (grid.bits - 1) - 1)
        return _positive(scales), np.full(scales.shape, 2 ** (grid.bits - 1), np.int32)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    scales = _positive((high - low) / (2**grid.bits - 1))
    return scales, np.clip(np.round(-low / scales), 0, 2**grid.bits - 1).astype(np.int32)


def round_to(weight: Weights, scales: Weights, zeros: Integers, grid: Grid) -> Blocks:
    """The whole numbers of `[N, K]` on given grids `[N, G]`."""
    low, high = limits(zeros, grid)
    blocks = _grouped(weight, grid)
    steps = np.clip(np.round(blocks / scales[..., None]), low[..., None], high[..., None]).astype(np.int32)
    return canonical(steps.reshape(len(weight), -1)[:, : weight.shape[1]], scales, grid)


def limits(zeros: Integers, grid: Grid) -> tuple[Integers, Integers]:
    """The least and the greatest step of each group."""
    if grid.symmetric:
        most = np.full(zeros.shape, 2 ** (grid.bits - 1) - 1, np.int32)
        return -most, most
    return -zeros, 2**grid.bits - 1 - zeros


def canonical(steps: Integers, scales: npt.NDArray[Any], grid: Grid) -> Blocks:
    """The one form of the same weights that `read` finds again: no common factor, the least zero point."""
    blocks = _grouped(steps, grid)
    factor = np.maximum(np.gcd.reduce(blocks, axis=2), 1)
    blocks = blocks // factor[..., None]
    flat = blocks.any(axis=2)
    return Blocks(
        blocks.reshape(len(steps), -1)[:, : steps.shape[1]].astype(np.int32),
        np.where(flat, short(scales.astype(np.float64) * factor), 1).astype(np.float32),
        _zeros(blocks, grid),
        blocks.shape[2],
    )


def _zeros(blocks: npt.NDArray[Any], grid: Grid) -> Integers:
    if grid.symmetric:
        return np.full(blocks.shape[:2], 2 ** (grid.bits - 1), np.int32)
    return np.asarray(-np.minimum(blocks.min(axis=2), 0), np.int32)


def read(weight: Weights, grid: Grid, name: str = "the matrix") -> Blocks:
    """Scales and whole numbers of weights `[N, K]` that a quantizer has put on a grid.

    Raises:
        ModelError: the weights are not on such a grid.
    """
    blocks = _grouped(weight, grid).astype(np.float64)
    largest = np.abs(blocks).max(axis=2)
    steps = np.zeros(blocks.shape, np.int32)
    scales = np.ones(largest.shape, np.float64)
    open_ = largest > 0
    # A quantizer may use the one step below zero that nearest rounding leaves out.
    most = 2 ** (grid.bits - 1) if grid.symmetric else 2**grid.bits - 1
    # What a rounded range gives comes first, then what is left of a quantizer's choice.
    for count in (most - 1, most, *range(1, most - 1)) if most > 1 else (1,):
        if not open_.any():
            break
        scale = largest[open_] / count
        ratio = blocks[open_] / scale[:, None]
        fits = (np.abs(ratio - np.round(ratio)) < 1e-3).all(axis=1)
        where = tuple(index[fits] for index in np.nonzero(open_))
        steps[where], scales[where] = np.round(ratio[fits]).astype(np.int32), scale[fits]
        open_[where] = False
    found = canonical(steps.reshape(len(weight), -1)[:, : weight.shape[1]], scales, grid)
    kept = _grouped(found.steps, grid)
    over = kept.max(axis=2) >= most if grid.symmetric else kept.max(axis=2) - kept.min(axis=2) > most
    if open_.any() or over.any():
        raise ModelError(
            f"{name} has weights that are not on the {grid.bits}-bit grid that config.json states: they were changed "
            "after quantization; quantize the float model again"
        )
    return found


def _grouped(values: npt.NDArray[Any], grid: Grid) -> npt.NDArray[Any]:
    """`[N, K]` as `[N, G, width]`, the last group filled up with zeros."""
    width = group_width(grid, values.shape[1])
    missing = -values.shape[1] % width
    return np.pad(values, ((0, 0), (0, missing))).reshape(len(values), -1, width)


def _positive(scales: npt.NDArray[Any]) -> Weights:
    """Scales as they are kept; 1 for groups without any weight but zero, or so small that nothing is left of them."""
    least = float(np.finfo(np.float32).tiny) * 2**8
    return np.where(scales > least, short(np.maximum(scales, least)), 1).astype(np.float32)
