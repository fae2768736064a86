"""What the dense branch beside a sparse matrix is set to, when weights of the matrix go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.families import boost
from edgekd.families.boost import Boosted
from edgekd.sparsify.matrices import weight_parameter
from edgekd.surgery.obs import factor

DAMPING = 0.01


def install(model: Any, found: dict[str, Any], inputs: int) -> None:
    """Put a boost on every linear layer of those found, in place.

    Raises:
        ModelError: a width does not divide, or the model has boosts already.
    """
    if (there := boost.described(model)) is not None:
        raise ModelError(
            f"the model has a boost over {there['inputs']} inputs from an earlier sparsify, which goes on: leave "
            "`boost` out"
        )
    boost.install(model, [name for name, module in found.items() if isinstance(module, nn.Linear)], inputs)


def boosts(model: Any) -> dict[int, Boosted]:
    """The boosts of a model by the identity of the matrix beside them."""
    return {id(module.linear): module for module in model.modules() if isinstance(module, Boosted)}


@torch.no_grad()
def make_up(boosted: Boosted, lost: Tensor, gram: Tensor) -> None:
    """Let the boost take over what a matrix `[D, F]` has lost, as far as it can.

    Without `gram` it is the mean of what is lost over each block, as in AST. UNCONFIRMED: whether that mean is over all
    weights of a block, which is the best for inputs that know nothing of each other, or over the lost ones alone.
    ADAPT: with the inputs' `X Xᵀ [F, F]`, it is the `B` that makes `‖(lost - B P) X‖²` least.
    """
    size, blocks = boosted.inputs, weight_parameter(boosted.blocks)
    if not gram.numel():
        blocks.add_(lost.unflatten(-1, (-1, size)).mean(-1))  # type: ignore[no-untyped-call]
        return
    sums = gram.double().unflatten(-1, (-1, size)).sum(-1)  # type: ignore[no-untyped-call]  # X Xᵀ Pᵀ
    _, lower = factor(sums.unflatten(0, (-1, size)).sum(1), DAMPING)
    best = torch.cholesky_solve((lost.double() @ sums).T, lower).T
    blocks.add_(best.to(blocks.dtype))
