"""Whether one operator pays: the artifact with it against the one without, built and timed side by side."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.devices import is_estimated, unavailable
from edgekd.errors import ModelError
from edgekd.export.lower import CALIBRATED, calibrate, lower, operators_to_calibrate
from edgekd.export.onnx import export_float
from edgekd.export.operators import check_operators
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import VERDICT, ratio_interval

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

SMALLER = 0.99
"""A file is smaller if it has at most this share of the bytes: fewer nodes alone do not count."""
CLEAR = 1.05
"""A gain whose interval begins below this must hold in a second process: where models lie in memory has made copies of
one file differ by up to 2 % in one."""
EXAMPLES = 8
"""Examples from which ranges of activations are taken; time does not depend on them."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found: `speedup` is the ratio of medians, `interval` its 99 % interval, sizes in bytes.

    Without figures nothing could be measured, and `reason` says why.
    """

    kept: bool
    reason: str
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For the ledger."""
        known = {key: value for key, value in vars(self).items() if key != "facts" and value is not None}
        return {**known, **({"interval": list(self.interval)} if self.interval else {}), **self.facts}


def not_measured(ctx: Context) -> str | None:
    """Why an artifact cannot be timed on the target, or None if it can."""
    if reason := unavailable(ctx.target):
        return f"{ctx.target.name} cannot be measured here: {reason}"
    return "its latency is the vendor's estimate" if is_estimated(ctx.target) else None


def weigh(before: Path, after: Path, ctx: Context, *, force: bool) -> Verdict:
    """Time two artifacts in turns and keep the second if it is faster with certainty, or smaller.

    One that is smaller but slower with certainty is kept only where the budget limits the size.
    """
    speedup, interval = time_pair(before, after, ctx)
    if 1 < interval[0] < CLEAR:
        again = time_pair(before, after, replace(ctx, seed=ctx.seed + 1))[1]
        interval = min(interval[0], again[0]), max(interval[1], again[1])
    sizes = before.stat().st_size, after.stat().st_size
    faster, slower = interval[0] > 1, interval[1] < 1
    smaller = sizes[1] <= SMALLER * sizes[0]
    pays = faster or (smaller and (not slower or ctx.budget.size_mb is not None))
    found = [f"{speedup:.3f} times as fast (99 % interval {interval[0]:.3f} to {interval[1]:.3f})"]
    found.append(f"{sizes[1] / sizes[0]:.3f} times the size")
    decision = "kept" if pays else "kept because of force" if force else "dropped"
    return Verdict(
        kept=pays or force,
        reason=f"{decision}: {', '.join(found)}",
        speedup=speedup,
        interval=interval,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
    )


def time_pair(before: Path, after: Path, ctx: Context) -> tuple[float, tuple[float, float]]:
    """How many times as fast the second artifact is: ratio of medians, and its 99 % interval."""
    budget = ctx.budget
    first, second = measure(
        [Subject(name="before", path=before), Subject(name="after", path=after)],
        target=ctx.target,
        batch=budget.batch,
        sequence=budget.sequence,
        threads=budget.threads,
        settings=Settings(blocks=60, seed=ctx.seed),
    )
    interval = ratio_interval(first, second, level=VERDICT, seed=ctx.seed)
    return float(np.median(first.ms) / np.median(second.ms)), interval


def build(student: Student, ctx: Context, output: Path) -> Path:
    """The student's artifact in the form in which it is expected to ship.

    Raises:
        StageError: the graph cannot be exported.
        ModelError: it has operators that the target does not run.
    """
    graph = export_float(student, ctx.task.name, output.with_suffix(".float.onnx"))
    ranges = None
    if ctx.lowering in CALIBRATED:
        ranges = calibrate(graph, _feeds(ctx), operators=operators_to_calibrate(ctx.lowering))
    fixed: dict[str, Any] = {}
    if ctx.target.is_static:
        fixed = {"batch": ctx.budget.batch, "sequence": ctx.budget.sequence}
    try:
        lower(
            graph,
            output,
            ctx.lowering,
            ranges=ranges,
            model_type=student.model.config.model_type,
            symmetric=ctx.target.symmetric,
            **fixed,
        )
    finally:
        graph.unlink(missing_ok=True)
    if problems := check_operators(output, ctx.target):
        raise ModelError(f"{ctx.target.name} does not run it: {'; '.join(problems)}")
    return output


def _feeds(ctx: Context) -> list[dict[str, Any]]:
    feeds = []
    for index in range(min(EXAMPLES, len(ctx.train))):
        batch = ctx.train.collate(np.array([index]), int(ctx.train.lengths[index]))
        feeds.append({name: value.numpy() for name, value in batch.items() if name != "labels"})
    return feeds
