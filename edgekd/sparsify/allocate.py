"""How many weights each matrix keeps, so that the model as a whole has the share of zeros asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgekd.sparsify.matrices import as_matrix
from edgekd.sparsify.patterns import Pattern

OUTLIER = 5.0
"""How many times the mean an entry must be to be an outlier (the paper's M)."""
SWING = 0.08
"""How far the densities of layers lie from the mean at most (the paper's λ)."""
Layers = Sequence[Sequence[str]]


def uniform(found: Mapping[str, Any], density: float, layers: Layers, scales: Mapping[str, Tensor]) -> dict[str, float]:
    """The same density in every matrix."""
    return dict.fromkeys(found, density)


def pooled(found: Mapping[str, Any], density: float, layers: Layers, scales: Mapping[str, Tensor]) -> dict[str, float]:
    """What each matrix keeps when the largest weights of the whole model stay.

    Magnitudes are compared after dividing by their matrix's root mean square: without that, whole matrices of small
    weights would go. ADAPT.
    """
    scores = {name: _relative(as_matrix(module)) for name, module in found.items()}
    every = torch.cat([each.flatten() for each in scores.values()])
    threshold = every.kthvalue(max(len(every) - round(density * len(every)), 1)).values
    return {name: float((each > threshold).double().mean()) for name, each in scores.items()}


def owl(found: Mapping[str, Any], density: float, layers: Layers, scales: Mapping[str, Tensor]) -> dict[str, float]:
    """Layers with more outliers among |w| · ‖x‖₂ keep more, within ±`SWING` of the mean.

    Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL)", arXiv:2310.05175. ADAPT: layers of unequal size are
    weighted by their weights, and densities stay between 0 and 1.
    """
    rates, sizes = [], []
    for names in layers:
        scores = [as_matrix(found[name]).abs() * scales[name].to(torch.float32) for name in names]
        entries = torch.cat([each.flatten() for each in scores])
        rates.append(float((entries > OUTLIER * entries.mean()).double().mean()))
        sizes.append(len(entries))
    share, weights = torch.tensor(rates).double(), torch.tensor(sizes).double() / sum(sizes)
    span = float(share.max() - share.min())
    swing = min(SWING, density, 1 - density)
    raised = (share - share.min()) / span * 2 * swing if span else torch.zeros_like(share)
    raised = raised - (raised * weights).sum()
    raised = raised * min(1.0, swing / max(float(raised.abs().max()), 1e-12))
    chosen = (density + raised).tolist()
    return {name: value for names, value in zip(layers, chosen, strict=True) for name in names}


def _relative(matrix: Tensor) -> Tensor:
    return matrix.abs() / matrix.square().mean().sqrt().clamp_min(1e-12)


Allocation = Callable[[Mapping[str, Any], float, Layers, Mapping[str, Tensor]], dict[str, float]]

ALLOCATIONS: dict[str, Allocation] = {"layer": uniform, "global": pooled, "owl": owl}
"""`(matrices, density, names by residual layer, ‖x‖₂ of inputs by name)`, by the name in a recipe."""


def allocate(
    name: str, found: Mapping[str, Any], pattern: Pattern, density: float, layers: Layers, scales: Mapping[str, Tensor]
) -> dict[str, float]:
    """The density of each matrix; an N:M pattern leaves no choice."""
    share_out = uniform if pattern.is_grouped else ALLOCATIONS[name]
    return share_out(found, density, layers, scales)
