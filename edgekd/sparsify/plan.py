"""What is cut from a model: its matrices, the density that each is to have, and how zeros are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgekd.families.boost import Boosted
from edgekd.sparsify import Sparsify
from edgekd.sparsify.allocate import allocate
from edgekd.sparsify.boost import boosts, make_up
from edgekd.sparsify.calibration import grams, norms
from edgekd.sparsify.masked import Masks
from edgekd.sparsify.masks import choose
from edgekd.sparsify.matrices import as_matrix, matrices
from edgekd.sparsify.oneshot import METHODS
from edgekd.sparsify.patterns import Pattern
from edgekd.student import Student
from edgekd.surgery.replay import Batch


@dataclass(frozen=True)
class Inside:
    """A residual layer and the names of its matrices."""

    layer: Any
    names: Sequence[str]

    def grams(self, model: Any, modules: Mapping[str, Any], batches: Sequence[Batch]) -> dict[str, Tensor]:
        """`X Xᵀ` of the inputs of its matrices."""
        return grams(model, {name: modules[name] for name in self.names}, batches, until=self.layer)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model becomes sparse: `layers` are its residual layers with the names of their matrices, `scales` ‖x‖₂.

    It is made of the dense model, so that a run that is taken up again has the same.
    """

    model: Any
    pattern: Pattern
    method: str
    modules: Mapping[str, Any]
    layers: Sequence[Inside]
    densities: Mapping[str, float]
    scales: Mapping[str, Tensor]
    batches: Sequence[Batch]
    boosts: Mapping[str, Boosted]

    @torch.no_grad()
    def cut(self, masks: Masks, share: float) -> None:
        """Bring the model to this share of its final zeros, the first layer first; no zero becomes a weight again."""
        for inside in self.layers:
            sums = self._grams(inside)
            for name in inside.names:
                density = 1 - share * (1 - self.densities[name])
                weight = as_matrix(self.modules[name])
                found = METHODS[self.method](weight, sums[name], self.pattern, density, masks.kept(name))
                self._make_up(name, weight * masks.kept(name) - found.weight, sums[name])
                masks.put(name, found.mask, found.weight)

    @torch.no_grad()
    def settle(self, masks: Masks) -> None:
        """Let boosts take over from weights that adapting masks hide, before those go for good."""
        for name, module in self.modules.items():
            self._make_up(name, as_matrix(module) * ~masks.kept(name), torch.zeros(0))

    def _make_up(self, name: str, lost: Tensor, gram: Tensor) -> None:
        if name in self.boosts:
            make_up(self.boosts[name], lost, gram)

    def choose(self, masks: Masks) -> None:
        """Set the final number of zeros by the present weights, hidden ones included, and change no weight."""
        for name, module in self.modules.items():
            scores, by_row = as_matrix(module).abs(), name in self.scales
            scores = scores * self.scales[name].to(scores) if by_row else scores
            masks.put(name, choose(scores, self.pattern, self.densities[name], by_row=by_row))

    def _grams(self, inside: Inside) -> Mapping[str, Tensor]:
        if self.method == "magnitude":
            return dict.fromkeys(inside.names, torch.zeros(0))
        return inside.grams(self.model, self.modules, self.batches)


def make_plan(settings: Sparsify, student: Student, pattern: Pattern, batches: Sequence[Batch]) -> Plan:
    """The plan of a student that is still dense.

    Raises:
        ModelError: as `matrices`.
    """
    found = matrices(student, pattern, settings.dense)
    layers = _by_layer(student, found)
    adaptive_wanda = settings.masks == "adaptive" and settings.method == "wanda"
    needed = adaptive_wanda or (settings.allocation == "owl" and not pattern.is_grouped)
    scales = _scales(student.model, found, layers, batches) if needed else {}
    beside = boosts(student.model)
    density = 1 - (pattern.sparsity if settings.sparsity is None else settings.sparsity)
    return Plan(
        model=student.model,
        pattern=pattern,
        method=settings.method,
        modules=found,
        layers=layers,
        densities=allocate(settings.allocation, found, pattern, density, [each.names for each in layers], scales),
        scales=scales if adaptive_wanda else {},
        batches=batches,
        boosts={name: beside[id(module)] for name, module in found.items() if id(module) in beside},
    )


def _by_layer(student: Student, found: Mapping[str, Any]) -> list[Inside]:
    names = {id(module): name for name, module in found.items()}
    layers = student.family.layers(student.model)
    inside = [Inside(layer, [names[id(each)] for each in layer.modules() if id(each) in names]) for layer in layers]
    return [each for each in inside if each.names]


def _scales(
    model: Any, found: Mapping[str, Any], layers: Sequence[Inside], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """‖x‖₂ by matrix, one layer at a time: the products that they are taken from are large."""
    scales = {}
    for inside in layers:
        sums = inside.grams(model, found, batches)
        scales.update({name: norms(gram) for name, gram in sums.items()})
    return scales
