"""How the learning rate goes over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def rate_at(step: int, total: int, *, warmup: float, schedule: str) -> float:
    """Factor on the learning rate for a step (from 0) of `total`: a ramp over the fraction `warmup`, then decay."""
    ramp = math.ceil(warmup * total)
    if step < ramp:
        return (step + 1) / ramp
    return SCHEDULES[schedule](min((step - ramp) / max(total - ramp, 1), 1.0))
