"""Optimal Brain Surgeon for groups of inputs of one matrix: what removing them costs, and what makes up for it.

Hassibi & Stork 1992; for heads and neurons as in ZipLM (Kurtić, Frantar & Alistarh 2023, arXiv 2302.04089). With
`H = X Xᵀ + λI` over the inputs `X` of a matrix `W`, removing the inputs `S` and updating the others costs

    ‖WX − ŴX‖² + λ‖W − Ŵ‖² = tr( W_S · ((H⁻¹)_SS)⁻¹ · W_Sᵀ ),   Ŵ = W − W_S · ((H⁻¹)_SS)⁻¹ · (H⁻¹)_S:

which is exact, and adds up when groups are removed one after the other with `H⁻¹` brought down in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Weighted sums over rows of inputs `x [n, F]`, and of what is wanted of them, `y [n, D]`, in float64."""

    def __init__(self) -> None:
        self.count = 0.0
        self.x = self.xx = self.y = self.xy = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Count more rows, each by its weight `[n]`."""
        x = x.double()
        weighted = x if weights is None else x * weights.double()[:, None]
        self.count += len(x) if weights is None else float(weights.double().sum())
        self.x = self.x + weighted.sum(0)
        self.xx = self.xx + weighted.T @ x
        if y is not None:
            y = y.double()
            self.xy = self.xy + weighted.T @ y
            self.y = self.y + (y if weights is None else y * weights.double()[:, None]).sum(0)

    def gram(self, *, centred: bool) -> Tensor:
        """`X Xᵀ [F, F]`; about the mean where a bias can take up what is constant."""
        return self.xx - torch.outer(self.x, self.x) / self.count if centred else self.xx

    def cross(self, *, centred: bool) -> Tensor:
        """`X Yᵀ [F, D]`, likewise."""
        return self.xy - torch.outer(self.x, self.y) / self.count if centred else self.xy


@dataclass(frozen=True)
class Removal:
    """One pass of removals: `order [G]`, first removed first, and `errors [G + 1]` by how many groups are kept.

    Errors are relative: 0 with everything kept, 1 with nothing kept.
    """

    order: Tensor
    errors: Tensor


def damped(gram: Tensor, damping: float) -> Tensor:
    """`H + λI`, λ being `damping` times the mean of the diagonal."""
    level = damping * float(gram.diagonal().mean())
    return gram + level * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped matrix and its Cholesky factor; the damping is raised tenfold until there is one."""
    level = damping
    while True:
        matrix = damped(gram, level)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return matrix, lower
        level = max(level * 10, 1e-12)
        if level > 1e6:  # inputs that are all zero
            unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return unit, unit


def group_errors(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """What removing each group of `width` inputs alone would cost, `[G]`; weight `[D, F]`, inverse `[F, F]`."""
    if width == 1:
        errors: Tensor = weight.square().sum(0) / inverse.diagonal()
        return errors
    count = len(inverse) // width
    groups = torch.arange(count * width).view(count, width)
    blocks = inverse[groups[:, :, None], groups[:, None, :]]
    parts = weight.T.reshape(count, width, -1)
    found: Tensor = (torch.linalg.solve(blocks, parts) * parts).sum((1, 2))
    return found


def greedy(weight: Tensor, gram: Tensor, *, width: int = 1, chunk: int = 1, damping: float = 0.01) -> Removal:
    """Remove all groups, the cheapest first, each time updating what is left.

    Args:
        weight: `[D, F]`.
        gram: `X Xᵀ [F, F]` of the matrix's inputs.
        width: neighbouring inputs that go together: a head's, or one for a neuron.
        chunk: groups removed at a time; what they cost together is shared out as they would cost alone.
        damping: λ as a fraction of the mean diagonal.
    """
    matrix, lower = factor(gram.double(), damping)
    weight, inverse = weight.double().clone(), torch.cholesky_inverse(lower)
    total = float(((weight @ matrix) * weight).sum())
    count = len(inverse) // width
    alive = torch.arange(count)
    order, costs = [], [torch.zeros(1, dtype=torch.float64)]
    while len(alive):
        errors = group_errors(weight, inverse, width)
        chosen = torch.argsort(errors, stable=True)[:chunk]
        order.append(alive[chosen])
        left = torch.ones(len(alive), dtype=torch.bool)
        left[chosen] = False
        cost, weight, inverse = _remove(weight, inverse, _spread(chosen, width), left.repeat_interleave(width))
        alone = errors[chosen].clamp(min=0.0) + 1e-300
        costs.append(cost * alone / alone.sum())
        alive = alive[left]
    lost = torch.cat(costs).cumsum(0) / max(total, 1e-300)
    return Removal(torch.cat(order), lost.flip(0))


def _remove(weight: Tensor, inverse: Tensor, gone: Tensor, left: Tensor) -> tuple[float, Tensor, Tensor]:
    """The cost of removing the inputs `gone`, and weight and inverse of the others."""
    block, rows = inverse[gone[:, None], gone], inverse[gone][:, left]
    part = weight[:, gone]
    solved = torch.linalg.solve(block, torch.cat([part.T, rows], dim=1))
    cost = float((solved[:, : len(weight)].T * part).sum())
    after = solved[:, len(weight) :]
    return max(cost, 0.0), weight[:, left] - part @ after, inverse[left][:, left] - rows.T @ after


def _spread(groups: Tensor, width: int) -> Tensor:
    return (groups[:, None] * width + torch.arange(width)).flatten()
