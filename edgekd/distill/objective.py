"""The weighted sum of losses over one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.distill.job import Batch
from edgekd.distill.signals import Signals, mean_tokens, observe, token_counts, valid_mask
from edgekd.distill.teachers import Source
from edgekd.distill.terms import Term
from edgekd.distill.wiring import Wiring


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
        ours = observe(self.model, batch, hidden=wiring.student_layers, qkv=wiring.student_qkv)
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
        return valid_mask(self.batch, self.ours.qkv[0].shape[1])

    def hidden(self) -> tuple[list[Tensor], list[Tensor]]:
        wiring = self.objective.wiring
        states = zip(wiring.projectors, wiring.pairs, strict=True)
        student = [projector(self.ours.hidden[s].float()) for projector, (s, _) in states]
        return student, [self._same_tokens(s, t) for s, t in wiring.pairs]

    def embedding(self) -> tuple[Tensor, Tensor]:
        student, teacher = self.objective.wiring.last or (-1, -1)
        rows = self.ours.hidden[student], self._same_tokens(student, teacher)
        kept = self.ours.kept.get(student)
        first, second = (mean_tokens(p, kept.counts if kept else token_counts(self.batch, len(p))) for p in rows)
        return first, second

    def _same_tokens(self, student: int, teacher: int) -> Tensor:
        """The teacher's state at the tokens that the student's has."""
        states, kept = self.theirs.hidden[teacher], self.ours.kept.get(student)
        return states if kept is None else states[kept.rows]


PAIRS: dict[str, Callable[[_Inputs], tuple[Any, Any]]] = {
    "logits": lambda inputs: (inputs.ours.logits, inputs.theirs.logits),
    "labels": lambda inputs: (inputs.ours.logits, inputs.labels()),
    "hidden": _Inputs.hidden,
    "embedding": _Inputs.embedding,
    "qkv": lambda inputs: (inputs.ours.qkv, inputs.theirs.qkv),
}
