"""When weights go in the course of a training run. Light: no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

EVENTS = 10
"""How often masks are set in a ramp that does not say it."""


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """The share of the final zeros over the steps of a run: none before `start`, all from `end` on, cubic between.

    Both are shares of all steps. Masks are set anew every `every` steps (0: ten times), at `start` and at `end`. The
    cubic form: Zhu & Gupta 2017, arXiv:1710.01878; from a quarter to three quarters of the compute: Jin et al. 2025,
    "The Journey Matters", arXiv:2501.12486. UNCONFIRMED: the ramp's shape in the latter.
    """

    start: float
    end: float
    every: int

    def first(self, total: int) -> int:
        """The step (from 0) before which weights go for the first time."""
        return min(math.floor(self.start * total), self.last(total))

    def last(self, total: int) -> int:
        """The step before which the masks become final, so that it and all later ones train what ships."""
        return max(min(math.ceil(self.end * total), total - 1), 0)

    def due(self, step: int, total: int) -> bool:
        """Whether masks are set before this step."""
        first, last = self.first(total), self.last(total)
        every = self.every or max((last - first) // EVENTS, 1)
        return first <= step <= last and (step == last or (step - first) % every == 0)

    def share(self, step: int, total: int) -> float:
        """The share of the final zeros that masks set before this step have, 0 to 1."""
        first, last = self.first(total), self.last(total)
        if step >= last:
            return 1.0
        if step < first:
            return 0.0
        done = (step - first + 1) / (last - first + 1)
        return float(1 - (1 - done) ** 3)

    def settled(self, done: int, total: int) -> bool:
        """Whether the masks are final after `done` steps, the one they were set for included."""
        return done > self.last(total)


def annealed(step: int, total: int, *, ramp: float, largest: float) -> float:
    """A coefficient that rises in a straight line from 0 to `largest` over the first share `ramp` of the steps."""
    rising = math.ceil(ramp * total)
    return largest if step >= rising else largest * step / rising
