"""The matrices of a model that may become sparse, as `[outputs, inputs]`, and what keeps one from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from edgekd.errors import ModelError, unknown
from edgekd.families.boost import Boosted
from edgekd.sparsify.patterns import Pattern
from edgekd.student import Student


def matrices(student: Student, pattern: Pattern, dense: Collection[str] = ()) -> dict[str, Any]:
    """The linear layers and convolutions inside the student's residual layers, by their names in the model.

    Embeddings, norms and the head stay dense, as do convolutions that do not see all channels, and what `dense` names.

    Raises:
        ModelError: one of them shares its weights with another module, or does not take the pattern; or none is left.
    """
    model, layers = student.model, student.family.layers(student.model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    inside -= {id(module.blocks) for module in model.modules() if isinstance(module, Boosted)}
    every = {name: module for name, module in model.named_modules() if id(module) in inside and _multiplies(module)}
    for name in dense:
        if name not in every:
            raise ModelError(f"dense: {unknown('module', name, every)}")
    found = {name: module for name, module in every.items() if name not in dense}
    if not found:
        raise ModelError("there is no matrix left to make sparse: `dense` names all of them")
    _require_own_weights(model, found)
    _require_fit(found, pattern)
    return found


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _require_own_weights(model: nn.Module, found: dict[str, Any]) -> None:
    owners: Counter[int] = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tied = [
        name for name, module in found.items() if owners[id(weight_parameter(module))] > 1 or places[id(module)] > 1
    ]
    if tied:
        raise ModelError(
            f"{', '.join(tied)}: these weights are shared with another place of the model, which would become sparse "
            "with them: name them in `dense`, or save the model with weights of its own in each place"
        )


def _require_fit(found: dict[str, Any], pattern: Pattern) -> None:
    wrong = {name: pattern.misfit(*as_matrix(module).shape) for name, module in found.items()}
    told = [f"{name}: {reason}" for name, reason in wrong.items() if reason]
    if told:
        raise ModelError(
            f"the pattern {pattern.name} does not fit {len(told)} of {len(wrong)} matrices ({'; '.join(told[:4])}"
            f"{'; …' if len(told) > 4 else ''}): name them in `dense`, prune to widths that divide, "
            "or choose another pattern"
        )


def weight_parameter(module: Any) -> nn.Parameter:
    """The parameter that is trained, behind any parametrization."""
    chain = getattr(module, "parametrizations", None)
    parameter: nn.Parameter = module.weight if chain is None or "weight" not in chain else chain.weight.original
    return parameter


def as_matrix(module: Any) -> Tensor:
    """The trained weights as `[D, F]`, not to be written to; of a convolution inputs of one place stand together."""
    return flat(weight_parameter(module).detach())


def flat(weight: Tensor) -> Tensor:
    """`[D, F]` stays, `[D, C, H, W]` becomes `[D, H * W * C]`: N:M counts along the channels."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def unflat(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `flat` for a weight of the shape of `like`."""
    if like.dim() == 2:
        return matrix
    out, channels, height, width = like.shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2).contiguous()
