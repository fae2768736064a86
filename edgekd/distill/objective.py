"""The weighted sum of losses over one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from edgekd.distill.job import Batch
from edgekd.distill.signals import Signals, mean_tokens, observe, token_counts, valid_mask
from edgekd.distill.teachers import Source
from edgekd.distill.terms import Term
from edgekd.distill.wiring import Wiring

Both = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Compares a model with its teacher and its labels (int64 `[N]`, -1 where the teacher decides)."""

    model: Any
    terms: Sequence[Term]
    wiring: Wiring
    teacher: Source | None
    labels: Tensor

    def __call__(self, batch: Batch, indices: np.ndarray) -> Tensor:
        """The loss of one batch, averaged over its samples."""
        wiring = self.wiring
        ours = observe(self.model, batch, **wiring.of("student"))
        # Products inside a loss must not fall to bf16.
        with torch.autocast(ours.logits.device.type, enabled=False):
            theirs = ours if self.teacher is None else self.teacher(indices, batch)
            return self._compare(ours, theirs, batch, indices)

    def _compare(self, ours: Signals, theirs: Signals, batch: Batch, indices: np.ndarray) -> Tensor:
        inputs = _Inputs(self, ours, theirs, batch, indices)
        total = torch.zeros((), device=ours.logits.device)
        for term in self.terms:
            first, *others = term.loss.needs
            student, teacher = PAIRS[first](inputs)
            extra = {name: getattr(inputs, name)() for name in others}
            total = total + term.weight * term.loss.function(student, teacher, **extra, **term.settings)
        return total


@dataclass(frozen=True)
class _Inputs:
    """What losses may ask for, worked out when they do."""

    objective: Objective
    ours: Signals
    theirs: Signals
    batch: Batch
    indices: np.ndarray

    def labels(self) -> Tensor:
        given = self.objective.labels[torch.from_numpy(self.indices)].to(self.ours.logits.device)
        return torch.where(given < 0, self.theirs.logits.argmax(-1), given)

    def mask(self) -> Tensor:
        qkv, maps = self.ours.qkv, list(self.ours.maps.values())
        return valid_mask(self.batch, qkv[0].shape[1] if qkv else maps[0].shape[-1])

    def hidden(self) -> Both:
        wiring = self.objective.wiring
        states = zip(wiring.projectors, wiring.pairs, strict=True)
        student = [projector(self.ours.hidden[s].float()) for projector, (s, _) in states]
        return student, [self._same_tokens(s, t) for s, t in wiring.pairs]

    def states(self) -> Both:
        student, teacher = self.hidden()
        if self.objective.wiring.entry:
            return [self.ours.hidden[0], *student], [self.theirs.hidden[0], *teacher]
        return student, teacher

    def maps(self) -> Both:
        pairs = self.objective.wiring.maps
        return [self.ours.maps[s] for s, _ in pairs], [self.theirs.maps[t] for _, t in pairs]

    def outputs(self) -> Both:
        wiring = self.objective.wiring
        states = zip(wiring.bridges, wiring.outputs, strict=True)
        student = [bridge(self.ours.outputs[s].float()) for bridge, (s, _) in states]
        return student, [self._kept_rows(self.theirs.outputs[t], s) for s, t in wiring.outputs]

    def features(self) -> Both:
        wiring = self.objective.wiring
        student, teacher = [], []
        for adapter, (s, t) in zip(wiring.adapters, wiring.features, strict=True):
            ours, theirs = self.ours.features[s].float(), self.theirs.features[t].float()
            if ours.dim() == 4 and ours.shape[2:] != theirs.shape[2:]:
                theirs = interpolate(theirs, ours.shape[2:], mode="bilinear")
            student.append(adapter(_positions(ours)))
            teacher.append(_positions(theirs))
        return student, teacher

    def embedding(self) -> tuple[Tensor, Tensor]:
        student, teacher = self.objective.wiring.last or (-1, -1)
        rows = self.ours.hidden[student], self._same_tokens(student, teacher)
        kept = self.ours.kept.get(student)
        first, second = (mean_tokens(p, kept.counts if kept else token_counts(self.batch, len(p))) for p in rows)
        return first, second

    def _same_tokens(self, student: int, teacher: int) -> Tensor:
        """The teacher's state at the tokens that the student's has."""
        return self._kept_rows(self.theirs.hidden[teacher], student)

    def _kept_rows(self, states: Tensor, student: int) -> Tensor:
        kept = self.ours.kept.get(student)
        return states if kept is None else states[kept.rows]


def _positions(features: Tensor) -> Tensor:
    """`[B, C, H, W]` or `[B, P, C]` to `[B, positions, C]`."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


PAIRS: dict[str, Callable[[_Inputs], tuple[Any, Any]]] = {
    "logits": lambda inputs: (inputs.ours.logits, inputs.theirs.logits),
    "labels": lambda inputs: (inputs.ours.logits, inputs.labels()),
    "hidden": _Inputs.hidden,
    "embedding": _Inputs.embedding,
    "qkv": lambda inputs: (inputs.ours.qkv, inputs.theirs.qkv),
    "states": _Inputs.states,
    "maps": _Inputs.maps,
    "outputs": _Inputs.outputs,
    "features": _Inputs.features,
}
