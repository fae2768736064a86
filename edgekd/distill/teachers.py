"""Running a trained model over data: the teacher's signals, live or from the cache, and plain predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgekd.distill.job import Batch
from edgekd.distill.precision import autocast
from edgekd.distill.signals import Signals, observe
from edgekd.tasks import batches

if TYPE_CHECKING:
    from edgekd.tasks import Encoded

Source = Callable[[np.ndarray, Batch], Signals]
PREDICT_BATCH = 64


def live(model: nn.Module, *, hidden: Sequence[int], precision: str = "fp32", **watched: Any) -> Source:
    """A source of signals that runs the model, in `eval()` mode and without gradients, on every batch.

    `watched` is what else `observe` must look at.
    """

    def source(indices: np.ndarray, batch: Batch) -> Signals:
        model.eval()
        device = next(iter(batch.values())).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False), autocast(device, precision):
            return observe(model, batch, hidden=hidden, **watched)

    return source


def sweep(source: Source, data: Encoded, device: torch.device) -> Iterator[tuple[np.ndarray, Batch, Signals]]:
    """The signals of all samples, in batches of similar length."""
    for indices in batches(data, PREDICT_BATCH, seed=0, epoch=0, shuffle=False):
        batch = {name: tensor.to(device) for name, tensor in data.collate(indices).items() if name != "labels"}
        yield indices, batch, source(indices, batch)


def predict(model: Any, data: Encoded, *, precision: str = "fp32") -> np.ndarray:
    """Logits of all samples, float32 `[N, C]`; the model's mode is left as it was."""
    training, device = model.training, next(model.parameters()).device
    logits: np.ndarray | None = None
    for indices, _, signals in sweep(live(model, hidden=(), precision=precision), data, device):
        part = signals.logits.float().cpu().numpy()
        if logits is None:
            logits = np.empty((len(data), part.shape[1]), np.float32)
        logits[indices] = part
    model.train(training)
    return np.empty((0, 0), np.float32) if logits is None else logits


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
