"""Zero-shot scoring: how far a cut, untrained student's answers are from the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgekd.arch import Arch
from edgekd.student import Student
from edgekd.surgery import Importance, cut
from edgekd.surgery.sample import sample_batches

if TYPE_CHECKING:
    from edgekd.context import Context

LARGE = 25_000_000
"""Parameters beyond which fewer examples are used, in proportion, so that scoring large models stays affordable."""
FEWEST = 32


class Scorer:
    """Scores shapes by `KL(teacher ‖ cut student)` in nats, mean over a fixed sample; lower is better."""

    def __init__(self, student: Student, importance: Importance, ctx: Context, samples: int) -> None:
        own = family_parameters(student)
        count = max(FEWEST, int(samples * min(1.0, LARGE / own)))
        self.student, self.importance = student, importance
        self.batches = sample_batches(ctx.train, count, seed=ctx.seed + 1)
        self.targets = [logits.log_softmax(-1) for logits in run(ctx.teacher.model, self.batches)]
        self.known: dict[Arch, float] = {}

    def __call__(self, arch: Arch) -> float:
        """Cut a copy to `arch` and compare; every shape is scored once."""
        if arch not in self.known:
            model = cut(self.student, arch, self.importance).model
            total, rows = 0.0, 0
            for logits, target in zip(run(model, self.batches), self.targets, strict=True):
                total += float(functional.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True))
                rows += len(target)
            self.known[arch] = total / rows
        return self.known[arch]


def family_parameters(student: Student) -> int:
    """Parameters of the residual layers, embeddings and heads left out."""
    return sum(p.numel() for layer in student.family.layers(student.model) for p in layer.parameters())


@torch.no_grad()
def run(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Float32 logits `[B, C]` of each batch, in `eval()` mode."""
    model.eval()
    return [model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float() for batch in batches]
