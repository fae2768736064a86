"""What a training run is asked to do, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the loop. `warmup` is a fraction of all steps; 0 turns off clip, ema, patience and intervals."""

    epochs: int = 3
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.01
    gradient_accumulation: int = 1
    gradient_clip: float = 1.0
    ema: float = 0.0
    patience: int = 0
    evaluate_steps: int = 0
    precision: str = "auto"
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what.

    `plan(epoch)` gives the epoch's batches of sample indices; `collate(indices)` the tensors of one batch;
    `loss(batch, indices)` the mean loss of its samples. `modules` holds all that is trained; `evaluate()` scores
    its present weights, more is better. `after_step` runs after every optimizer step (masks, schedules).
    """

    modules: nn.Module
    plan: Callable[[int], list[np.ndarray]]
    collate: Callable[[np.ndarray], Batch]
    loss: Callable[[Batch, np.ndarray], Tensor]
    evaluate: Callable[[], float]
    fingerprint: str = ""
    after_step: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended; the modules hold the best weights. `history` has step, epoch, loss and metric."""

    metric: float
    best_step: int
    steps: int
    history: tuple[dict[str, float], ...]


def describe(outcome: Outcome) -> dict[str, Any]:
    """Plain data of an outcome, for ledgers."""
    return {**asdict(outcome), "history": list(outcome.history)}
