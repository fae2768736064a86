"""Choosing zeros without training: by magnitude, by Wanda, and by SparseGPT, which also updates what stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.sparsify.calibration import norms
from edgekd.sparsify.masks import choose
from edgekd.sparsify.patterns import Pattern
from edgekd.surgery.obs import factor

DAMPING = 0.01
CHUNK = 128
"""Inputs after whose removal the rest of a matrix is brought up to date, as in the paper."""


@dataclass(frozen=True)
class Cut:
    """A matrix `[D, F]` with its zeros, and the mask of what stays."""

    weight: Tensor
    mask: Tensor


Method = Callable[[Tensor, Tensor, Pattern, float, Tensor], Cut]


def magnitude(weight: Tensor, gram: Tensor, pattern: Pattern, density: float, allowed: Tensor) -> Cut:
    """The largest weights stay."""
    mask = choose(_within(weight.abs(), allowed), pattern, density) & allowed
    return Cut(weight * mask, mask)


def wanda(weight: Tensor, gram: Tensor, pattern: Pattern, density: float, allowed: Tensor) -> Cut:
    """Of each output the weights of the highest |w| · ‖x‖₂ stay. Sun et al. 2023, arXiv:2306.11695.

    ADAPT: blocks are compared over the whole matrix.
    """
    scores = weight.abs() * norms(gram).to(weight)
    mask = choose(_within(scores, allowed), pattern, density, by_row=True) & allowed
    return Cut(weight * mask, mask)


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern, density: float, allowed: Tensor) -> Cut:
    """Remove what costs least, inputs from left to right, and let the later inputs of the output make up for it.

    Frantar & Alistarh 2023, "SparseGPT", arXiv:2301.00774: with `U` the upper Cholesky factor of `(X Xᵀ + λI)⁻¹`,
    removing `w_j` costs `w_j² / U_jj²` and changes the inputs after it by `-w_j / U_jj · U_j,j:`. The mask of `CHUNK`
    inputs, or of one group of an N:M pattern, is chosen when it is their turn, with as many zeros in each.

    Args:
        weight: `[D, F]`; it is not changed.
        gram: `X Xᵀ [F, F]` of its inputs.
        pattern: where zeros may stand.
        density: the share that stays.
        allowed: `[D, F]`; what is false there stays zero.
    """
    _, lower = factor(gram.double(), DAMPING)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(torch.float64)
    work, mask = weight.double() * allowed, torch.zeros_like(allowed)
    for first in range(0, weight.shape[1], _chunk(pattern)):
        part = slice(first, min(first + _chunk(pattern), weight.shape[1]))
        scores = (work[:, part] / upper.diagonal()[part]).square()
        mask[:, part] = choose(_within(scores, allowed[:, part]), pattern, density) & allowed[:, part]
        errors = _clear(work[:, part], mask[:, part], upper[part, part])
        work[:, part.stop :] -= errors @ upper[part, part.stop :]
    return Cut((work * mask).to(weight.dtype), mask)


METHODS: dict[str, Method] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
"""`(weight [D, F], gram [F, F], pattern, density, allowed [D, F])`, by the name in a recipe."""


def _clear(work: Tensor, mask: Tensor, upper: Tensor) -> Tensor:
    """Zero what the mask leaves out, in place, column by column; what later columns have to make up for, `[D, c]`."""
    errors = torch.zeros_like(work)
    for column in range(work.shape[1]):
        error = torch.where(mask[:, column], 0.0, work[:, column]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
        errors[:, column] = error
    return errors


def _chunk(pattern: Pattern) -> int:
    """Inputs whose mask is chosen together: a group of N:M, else about `CHUNK`, in whole blocks."""
    return pattern.group or max(CHUNK // pattern.columns, 1) * pattern.columns


def _within(scores: Tensor, allowed: Tensor) -> Tensor:
    """Scores in which nothing that is gone already comes before what is still there."""
    return torch.where(allowed, scores, -1.0)


def output_error(weight: Tensor, cut: Tensor, gram: Tensor) -> float:
    """`‖WX - ŴX‖² / ‖WX‖²` of a cut matrix."""
    missing, whole = (weight - cut).double(), weight.double()
    return float(((missing @ gram) * missing).sum() / ((whole @ gram) * whole).sum().clamp_min(1e-300))
