"""What a proxy may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgekd.arch import Arch, Layer
from edgekd.student import Student
from edgekd.surgery import Importance

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.tasks import Encoded

Batch = dict[str, torch.Tensor]

LARGE = 25_000_000
"""Parameters beyond which fewer examples are used, in proportion, so that scoring large models stays affordable."""
FEWEST = 32
BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class ProxyContext:
    """The model to cut, its teacher, and a fixed sample of training data.

    `batches` are model inputs and `labels[i]` int64 `[B]` the classes of `batches[i]`, each of them known.
    """

    student: Student
    teacher: Student
    importance: Importance
    batches: Sequence[Batch]
    labels: Sequence[torch.Tensor]
    seed: int = 0

    def positions(self, arch: Arch) -> list[tuple[int, Layer]]:
        """The layers of a shape, each with the student's own layer that it is cut from."""
        position = {layer.source: i for i, layer in enumerate(self.student.arch.layers)}
        return [(position[layer.source], layer) for layer in arch.layers]


def gather(student: Student, importance: Importance, ctx: Context, samples: int) -> ProxyContext:
    """Draw at most `samples` training examples without replacement, fewer (at least 32) for a large student.

    Batches are sorted by length. The teacher's answer stands in for a label that is missing.
    """
    count = max(FEWEST, int(samples * min(1.0, LARGE / layer_parameters(student))))
    part = _drawn(ctx.train, count, seed=ctx.seed + 1)
    rows = [np.arange(i, min(i + BATCH_SIZE, len(part))) for i in range(0, len(part), BATCH_SIZE)]
    batches = [part.collate(indices) for indices in rows]
    known = np.full(len(part), -1) if part.labels is None else part.labels
    labels = [torch.from_numpy(np.asarray(known[indices], np.int64)) for indices in rows]
    if any(bool((given < 0).any()) for given in labels):
        answers = [logits.argmax(-1) for logits in run(ctx.teacher.model, batches)]
        labels = [torch.where(given < 0, answer, given) for given, answer in zip(labels, answers, strict=True)]
    return ProxyContext(
        student=student, teacher=ctx.teacher, importance=importance, batches=batches, labels=labels, seed=ctx.seed
    )


def _drawn(data: Encoded, count: int, *, seed: int) -> Encoded:
    chosen = np.random.default_rng(seed).permutation(len(data))[:count]
    return data.take(chosen[np.argsort(data.lengths[chosen], kind="stable")])


def layer_parameters(student: Student) -> int:
    """Parameters of the residual layers, embeddings and heads left out."""
    return sum(p.numel() for layer in student.family.layers(student.model) for p in layer.parameters())


@torch.no_grad()
def run(model: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Float32 logits `[B, C]` of each batch, in `eval()` mode."""
    model.eval()
    return [model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float() for batch in batches]
