"""What a training run is asked to do, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what.

    `plan(epoch)` gives the epoch's batches of sample indices; `collate(indices)` the tensors of one batch;
    `loss(batch, indices)` the mean loss of its samples. `modules` holds all that is trained; `evaluate()` scores
    its present weights, more is better.

    Steps count from 0. `before_step(step, steps in all)` runs before the batches of an optimizer step, `after_step`
    after it; both must depend on the step and the modules' tensors alone, so that a run can be taken up again.
    `decay(step, steps in all)` gives what else pulls at parameters, outside the momentum (`step_with_decay`).
    `settled(steps done, steps in all)`: whether the modules are what may be kept; unsettled ones are only evaluated.
    """

    modules: nn.Module
    plan: Callable[[int], list[np.ndarray]]
    collate: Callable[[np.ndarray], Batch]
    loss: Callable[[Batch, np.ndarray], Tensor]
    evaluate: Callable[[], float]
    fingerprint: str = ""
    after_step: Callable[[], None] | None = None
    before_step: Callable[[int, int], None] | None = None
    decay: Callable[[int, int], Mapping[nn.Parameter, Tensor]] | None = None
    settled: Callable[[int, int], bool] = lambda done, total: True


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
