"""Measure what was chosen, and correct the limit until the measured latency is just under the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body
from edgekd.errors import BudgetError
from edgekd.search.candidates import Pool
from edgekd.search.timing import Gauge
from edgekd.search.variants import variant_of

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.search import Search

Kind = tuple[tuple[int, ...], int, str]

CLOSE = 0.93
"""A measured shape that uses at least this share of the budget is not worth enlarging."""
ENOUGH = 0.8
"""Shapes with the chosen layers that use less than this share of what the largest one uses are passed over."""


class Hunt:
    """One search: shapes under a limit in predicted milliseconds, measured at most `checks` times.

    What is measured is what will ship: `ctx.reshape` of a shape. `measured` holds the share of the budget that each
    measured shape uses, `checks` the same for the ledger, and `limit` the limit as corrected last.
    """

    def __init__(self, settings: Search, pool: Pool, gauge: Gauge, body: Body, tail: float, ctx: Context) -> None:
        self.settings, self.pool, self.gauge, self.body, self.tail, self.ctx = settings, pool, gauge, body, tail, ctx
        self.predict, self.space = pool.means.predict, pool.means.space
        self.aim = (1 - settings.margin) * ctx.strictness
        self.left = settings.checks
        self.limit = 0.0
        self.measured: dict[Arch, float] = {}
        self.checks: list[dict[str, Any]] = []

    def run(self) -> Arch:
        """Alternate between choosing and measuring until the measured latency is just under the budget.

        Raises:
            BudgetError: even the smallest shape misses the budget.
        """
        self.open()
        plan = self.best() or self.space.smallest()
        while self.left:
            self.measure([plan])
            if self.fits(plan):
                return plan
            self.limit = self.corrected(plan)
            following = self.following(plan)
            if following is None:
                break
            plan = following
        return self.settle(plan)

    def open(self) -> None:
        """Set the first limit; where not even the smallest shape is predicted to be under it, measure that one first.

        Raises:
            BudgetError: it misses the budget as measured.
        """
        self.limit = self.first_limit() * self.aim
        smallest = self.space.smallest()
        if self.predict(smallest) > self.limit and self.use([(self.body, smallest)])[0] > self.ctx.strictness:
            raise BudgetError(self.gauge.out_of_reach(self.measured[smallest], smallest.describe()))

    def first_limit(self) -> float:
        """The median in table milliseconds that would use up the budget."""
        budget, limits = self.ctx.budget, []
        if budget.speedup is not None:
            limits.append(self.gauge.teacher_ms / budget.speedup)
        if budget.latency_p95_ms is not None:
            limits.append(budget.latency_p95_ms / self.tail)
        return min(limits)

    def best(self) -> Arch | None:
        """The shape under the limit with the lowest proxy that was not measured yet."""
        found = self.pool.ranked(self.limit)
        return next((candidate.arch for candidate in found if candidate.arch not in self.measured), None)

    def measure(self, plans: Sequence[Arch]) -> None:
        """Measure shapes side by side: one check."""
        self.left -= 1
        for plan, used in zip(plans, self.use([(self.body, plan) for plan in plans]), strict=True):
            told = used if math.isfinite(used) else None
            self.checks.append({"shape": plan.describe(), "predicted_ms": self.predict(plan), "used": told})
            if told is not None:
                self.ctx.progress.say(f"search: {plan.describe()} uses {used:.0%} of the budget as {self.gauge.how}")

    def use(self, plans: Sequence[tuple[Body, Arch]]) -> list[float]:
        """Shares of the budget that shapes of some bodies use once they are as they will ship.

        Predictions stand in where nothing can be run; those are for shapes of the student's own body only.
        """
        asked = [
            (body, self.ctx.reshape(arch), self.predict(arch) if body is self.body else float("inf"))
            for body, arch in plans
        ]
        found = self.gauge.used(asked)
        self.measured |= {arch: used for (body, arch), used in zip(plans, found, strict=True) if body is self.body}
        return found

    def fits(self, plan: Arch) -> bool:
        """Whether a measured shape is within the budget and uses enough of it, or cannot be any larger."""
        used, strictness = self.measured[plan], self.ctx.strictness
        return used <= strictness and (used >= CLOSE * strictness or plan == self.space.arch)

    def corrected(self, plan: Arch) -> float:
        """The limit for shapes whose latencies are mispredicted as that of this measured one."""
        if math.isinf(self.measured[plan]):
            return self.predict(plan)
        return self.predict(plan) * self.aim / self.measured[plan]

    def following(self, plan: Arch) -> Arch | None:
        """What to measure after a shape that does not fit: another one the first time, then one with its layers."""
        if len(self.measured) == 1 and (other := self.best()) is not None:
            return other
        smallest = self.space.smallest()
        return self.refined(plan) or self.best() or (smallest if smallest not in self.measured else None)

    def refined(self, plan: Arch) -> Arch | None:
        """A shape near the best of the measured ones that keep the layers of `plan`, in the size that should fit."""
        alike = self.alike(plan)
        near = min(alike, key=lambda known: abs(self.measured[known] - self.aim))
        return self.pool.fitted(near, self.between(alike) or self.corrected(near), avoid=list(self.measured))

    def between(self, shapes: Sequence[Arch]) -> float | None:
        """The limit on the line between the measured shapes next to the aim on either side; None if one side is empty.

        One measurement may be off; to correct by the nearest alone would then end at the same size again and again.
        """
        below = [shape for shape in shapes if self.measured[shape] <= self.aim]
        above = [shape for shape in shapes if self.measured[shape] > self.aim]
        if not below or not above:
            return None
        low, high = max(below, key=self.measured.__getitem__), min(above, key=self.measured.__getitem__)
        share = (self.aim - self.measured[low]) / (self.measured[high] - self.measured[low])
        limit = self.predict(low) + share * (self.predict(high) - self.predict(low))
        return limit if self.predict(low) < self.predict(high) else None

    def alike(self, plan: Arch) -> list[Arch]:
        """The measured shapes of the same kind (layers, residual stream, variant); all measured ones if none is."""
        return [known for known in self.measured if _kind(known) == _kind(plan)] or list(self.measured)

    def is_alike(self, shape: Arch, other: Arch) -> bool:
        """Whether two shapes have the same layers, residual stream and variant."""
        return _kind(shape) == _kind(other)

    def refine(self, plan: Arch) -> Arch:
        """Adjust the widths of a shape, its layers kept, until it fits as measured.

        Raises:
            BudgetError: it is the smallest shape and misses the budget.
        """
        while plan not in self.measured or not self.fits(plan):
            if plan not in self.measured:
                if not self.left:
                    break
                self.measure([plan])
                continue
            following = self.refined(plan)
            if following is None:
                break
            plan = following
        return plan if plan in self.measured and self.fits(plan) else self.settle(plan)

    def settle(self, plan: Arch) -> Arch:
        """The largest measured shape within the budget, with the layers of `plan` where one uses enough of it.

        If none is within, `plan` where it was corrected after the last check, else the one that is nearest.

        Raises:
            BudgetError: that is the smallest shape.
        """
        if not self.measured:
            return plan
        within = {shape: used for shape, used in self.measured.items() if used <= self.ctx.strictness}
        if within:
            most = max(within.values())
            alike = [shape for shape in self.alike(plan) if within.get(shape, 0.0) >= ENOUGH * most]
            return max(alike or within, key=lambda shape: within[shape])
        if plan not in self.measured:
            return plan
        nearest = min(self.measured, key=lambda shape: self.measured[shape])
        if nearest == self.space.smallest():
            raise BudgetError(self.gauge.out_of_reach(self.measured[nearest], nearest.describe()))
        return nearest


def _kind(shape: Arch) -> Kind:
    return tuple(layer.source for layer in shape.layers), shape.hidden, variant_of(shape)
