"""What a sparse model promises of its zeros, and whether they are still there.

A trainer that knows of no masks fills them in without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 3


def promise(pattern: str, weights: Mapping[str, Tensor], *, storage: str = "dense") -> dict[str, Any]:
    """What `config.json` says of the matrices with these names: pattern, density, and how many zeros each has."""
    zeros = {name: _zeros(weight) for name, weight in weights.items()}
    share = sum(zeros.values()) / max(sum(weight.numel() for weight in weights.values()), 1)
    return {"pattern": pattern, "density": round(1 - share, 6), "storage": storage, "layers": zeros}


def count_zeros(model: nn.Module, promised: Mapping[str, Any]) -> tuple[int, int]:
    """How many zeros a model has in the matrices that promise some, and of how many weights."""
    weights: list[Any] = [model.get_submodule(name).weight for name in promised["layers"]]
    return sum(_zeros(weight) for weight in weights), sum(weight.numel() for weight in weights)


def _zeros(weight: Any) -> int:
    return int(weight.numel() - torch.count_nonzero(weight))


def lost_zeros(model: nn.Module, promised: Mapping[str, Any] | None) -> str:
    """What is wrong with the zeros of a model, or an empty string: layers with fewer of them than were promised."""
    layers: Mapping[str, int] = (promised or {}).get("layers", {})
    modules = dict(model.named_modules())
    wrong = []
    for name, zeros in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            wrong.append(f"{name} is gone")
            continue
        found = _zeros(weight)
        if found < zeros:
            wrong.append(f"{name} has {found / weight.numel():.1%} zeros, not {zeros / weight.numel():.1%}")
    if not wrong:
        return ""
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return (
        f"{len(wrong)} of {len(layers)} matrices have lost the zeros that config.json promises "
        f"(pattern {(promised or {}).get('pattern')}): {'; '.join(wrong[:SHOWN])}{more}. Trained without their masks, "
        "sparse weights become dense. To go on with it as a dense model, take `sparsity` out of the section `edgekd` "
        "of its config.json; `edgekd sparsify` then makes it sparse again and trains under masks"
    )
