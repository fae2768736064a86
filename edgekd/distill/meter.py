"""The losses of a run on their way to the progress bar."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from edgekd.context import Progress
from edgekd.distill.run import State
from edgekd.errors import RecipeError

_LOG_SECONDS = 0.5


class Meter:
    """Sums losses into the state, and tells a progress bar about them now and then."""

    def __init__(self, progress: Progress, state: State) -> None:
        self.progress, self.state = progress, state
        self.pending: list[Tensor] = []
        self.latest: dict[str, float] = {}
        self.shown = time.monotonic()

    def add(self, loss: Tensor) -> None:
        """Note the loss of one step."""
        self.pending.append(loss)
        if time.monotonic() - self.shown >= _LOG_SECONDS:
            self.flush()

    def flush(self, **metrics: float) -> None:
        """Read the pending losses, together, because reading one waits for the device."""
        losses = torch.stack(self.pending).tolist() if self.pending else []
        # One after the other, so that the sum does not depend on when it was read.
        for loss in losses:
            self.state.loss += loss
        self.state.losses += len(losses)
        now = time.monotonic()
        if losses:
            self.latest |= {"steps/s": len(losses) / max(now - self.shown, 1e-6), "loss": losses[-1]}
        self.latest |= metrics
        self.progress.advance(len(losses), **self.latest)
        self.pending, self.shown = [], now

    def take_mean(self, learning_rate: float) -> float:
        """The mean loss since it was last taken.

        Raises:
            RecipeError: it is infinite or not a number.
        """
        self.flush()
        mean = self.state.loss / max(self.state.losses, 1)
        self.state.loss, self.state.losses = 0.0, 0
        if not math.isfinite(mean):
            raise RecipeError(
                f"training diverged before step {self.state.step}: the loss is {mean}; "
                f"set learning_rate lower than {learning_rate:g}, or precision: fp32"
            )
        return mean
