"""Short distillations of finalists: each rung goes on from the weights of the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from edgekd.context import Silent
from edgekd.distill import Distill
from edgekd.distill.cache import cached
from edgekd.distill.recover import recover
from edgekd.distill.teachers import predict
from edgekd.files import publish
from edgekd.search.halving import Finalist
from edgekd.student import Student, load_student
from edgekd.surgery import Importance
from edgekd.surgery.reconstruct import cut_and_fit
from edgekd.surgery.sample import sample_batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.tasks import Encoded

BATCH_SIZE = 32
JUDGED = 1024
"""At most so many validation examples decide."""
CALIBRATED = 128
"""Training examples from which the remaining matrices of a cut student are reconstructed."""


class Tryout:
    """Trains finalists on parts of the training split and judges them by the validation split, never by test.

    Args:
        student: what shapes are cut from.
        importance: scores of its parts.
        checkpoints: students by the `source` of their finalists.
        ctx: teacher, data, and folders; teacher outputs are kept in `ctx.cache`, weights in `ctx.work`.
        label: what results depend on; part of the names of folders.
    """

    def __init__(
        self, student: Student, importance: Importance, checkpoints: Mapping[str, Student], ctx: Context, label: str
    ) -> None:
        self.student, self.importance, self.checkpoints, self.ctx = student, importance, checkpoints, ctx
        self.folder = ctx.work / f"finalists-{label[:12]}"
        self.order = np.random.default_rng(ctx.seed + 2).permutation(len(ctx.train))
        self.validation = _part(ctx.validation, JUDGED, ctx.seed)

    def __call__(self, finalist: Finalist, rung: int, steps: int) -> float:
        """Train on and return `KL(teacher ‖ student)` in nats on validation."""
        before = self.folder / finalist.key / str(rung - 1)
        if rung and not before.is_dir():
            self(finalist, rung - 1, steps // 2)
        student = load_student(before, auto_class=self.ctx.task.auto_class) if rung else self.start(finalist)
        chunk, epochs = self.data(rung, steps)
        work = self.folder / finalist.key / f"work-{rung}"
        work.mkdir(parents=True, exist_ok=True)
        ctx = replace(
            self.ctx, train=chunk, validation=self.validation, test=None, work=work, notes={}, progress=Silent()
        )
        settings = Distill(
            epochs=epochs, batch_size=BATCH_SIZE, losses={"forward_kl": {"weight": 1.0, "temperature": 2.0}}
        )
        trained = recover(settings, student, ctx)
        draft = self.folder / finalist.key / f"draft-{rung}"
        trained.save(draft)
        publish(draft, self.folder / finalist.key / str(rung), marker="config.json")
        found = self.divergence(trained)
        self.ctx.progress.say(f"search: {finalist.describe()}: divergence {found:.4g} after {steps} steps more")
        return found

    def start(self, finalist: Finalist) -> Student:
        """The student before its first rung: a checkpoint, or cut and reconstructed."""
        if finalist.source:
            return self.checkpoints[finalist.source]
        batches = sample_batches(self.ctx.train, CALIBRATED, seed=self.ctx.seed)
        return cut_and_fit(self.student, finalist.arch, self.importance, batches)[0]

    def data(self, rung: int, steps: int) -> tuple[Encoded, int]:
        """The part of the training split for a rung, the same for all finalists, and how often to go through it.

        Steps double from rung to rung, so `steps - steps / 2^rung` of them were taken before.
        """
        need = steps * BATCH_SIZE
        count = min(need, len(self.order))
        first = (steps - steps // 2**rung) * BATCH_SIZE
        chosen = self.order[np.arange(first, first + count) % len(self.order)]
        return self.ctx.train.take(chosen), math.ceil(need / count)

    def divergence(self, student: Student) -> float:
        """`KL(teacher ‖ student)` in nats, mean over the validation examples that decide."""
        device = torch.device("cpu")
        source = cached(
            self.ctx.teacher.model, self.validation, hidden=(), folder=self.ctx.cache, device=device, progress=Silent()
        )
        indices = np.arange(len(self.validation))
        target = source(indices, {"any": torch.zeros(1)}).logits.float().log_softmax(-1)
        own = torch.from_numpy(predict(student.model, self.validation)).float().log_softmax(-1)
        return float(functional.kl_div(own, target, reduction="batchmean", log_target=True))

    def path(self, name: str) -> Path:
        """A file or folder of this tryout."""
        return self.folder / name


def _part(data: Encoded, most: int, seed: int) -> Encoded:
    if len(data) <= most:
        return data
    return data.take(np.sort(np.random.default_rng(seed).permutation(len(data))[:most]))
