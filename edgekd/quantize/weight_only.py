"""Weights alone in 4 or 8 bits: GPTQ puts them on a grid that the graph takes over integer by integer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekd.errors import ModelError
from edgekd.export.nbits import Blocks, Grid, Weights, canonical, grid_of, grid_of_module, limits
from edgekd.quantize.linear import Inputs, copied, linear_layers
from edgekd.student import Student

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
LAZY = 128
"""Columns after which the error is carried over to all the others."""
GPTQ = "gptq"


def quantize_weights(student: Student, grid: Grid, inputs: Mapping[str, Inputs]) -> tuple[Student, dict[str, Any]]:
    """A copy of the student whose linear weights GPTQ has put on the grid, and what `quantization["weights"]` says.

    Args:
        student: a float model.
        grid: bits, group and zero points; pooler and classifier keep 8 bits.
        inputs: what goes into the layers on calibration data.
    """
    changed = copied(student)
    for name, layer in linear_layers(changed.model).items():
        weight = layer.weight.detach().numpy()
        blocks = gptq(weight, inputs[name].second.numpy(), grid_of_module(grid, name), name)
        layer.weight.data.copy_(torch.from_numpy(blocks.values()))
    return changed, {**grid.to_dict(), "method": GPTQ}


def gptq(weight: Weights, second: npt.NDArray[Any], grid: Grid, name: str = "the matrix") -> Blocks:
    """Round `[N, K]` column by column, each time making up for the error in the columns that are left.

    Frantar et al. 2022, arXiv 2210.17323: the columns in their own order, the Hessian of the squared output error from
    calibration inputs, the range of a group taken when its first column comes up.

    Args:
        weight: float32 `[N, K]`.
        second: mean outer product of the inputs, `[K, K]`.
        grid: how weights are rounded.
        name: for messages.

    Raises:
        ModelError: a weight is not finite, or the inputs' matrix cannot be inverted.
    """
    if not np.isfinite(weight).all():
        raise ModelError(f"{name} has weights that are not finite; the model is broken, train it again")
    inverse = _factor(second, name)
    left = weight.astype(np.float64)
    inputs = weight.shape[1]
    width = min(grid.group, inputs) if grid.group else inputs
    steps = np.zeros(weight.shape, np.int32)
    scales = np.ones((len(weight), -(-inputs // width)))
    zeros = np.zeros(scales.shape, np.int32)
    for start in range(0, inputs, LAZY):
        end = min(start + LAZY, inputs)
        errors = np.zeros((len(weight), end - start))
        for column in range(start, end):
            group = column // width
            if column % width == 0:
                scales[:, group], zeros[:, group] = _range_of(left[:, column : column + width], grid)
            low, high = limits(zeros[:, group], grid)
            steps[:, column] = np.clip(np.round(left[:, column] / scales[:, group]), low, high)
            error = (left[:, column] - steps[:, column] * scales[:, group]) / inverse[column, column]
            left[:, column:end] -= np.outer(error, inverse[column, column:end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ inverse[start:end, end:]
    return canonical(steps, scales, grid)


def _range_of(columns: npt.NDArray[Any], grid: Grid) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Scale and zero point `[N]` of one group."""
    whole = Grid(bits=grid.bits, group=0, symmetric=grid.symmetric)
    scales, zeros = grid_of(columns.astype(np.float32), whole)
    return scales[:, 0], zeros[:, 0]


def _factor(second: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """The upper Cholesky factor of the inverse Hessian; inputs that are never there count as small ones."""
    hessian = second.astype(np.float64).copy()
    diagonal = np.diag(hessian).copy()
    damping = DAMPING * float(diagonal.mean()) or 1.0
    hessian[np.diag_indices_from(hessian)] += damping
    try:
        return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(hessian)).T)
    except np.linalg.LinAlgError:
        raise ModelError(f"the inputs of {name} have no invertible second moment; give more calibration data") from None
