"""The no-gain guard: a stage stays only if what would ship got better in something that the stage is there for.

`buys` of a stage names what that is. Latency: the 99 % interval of the ratio of medians, after over before in one
interleaved run, lies wholly below 1; of two estimates, the later is lower. Size: at least 1 % smaller. Flash: the
same of what a vendor's compiler makes for the device; elsewhere nothing is compiled, so nothing is gained. Transfer:
the same of the file after deflate, if the student says that this is what the device stores. Metric: higher on
validation by more than chance among the examples that only one side gets right; if it is neither higher nor lower by
that much, the answers must be nearer to the teacher's (KL divergence). One of them is enough, but fewer bytes of
flash or transfer do not make up for a latency that got worse by 5 % (all of its interval, or the estimate).

`operators` times each of its operators itself, in the form that is to ship: what it has measured counts there, since
what is weighed here is the float form of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.operators.guard import CLEAR
from edgekd.pipeline.artifact import float_forms
from edgekd.pipeline.sides import Scale, Side, weigh
from edgekd.stages import Stage
from edgekd.student import Student

SMALLER = 0.01
"""The least share of its size that an artifact must lose to count as smaller."""


PAYS = "kept:"
"""How the reason begins for which `operators` kept what pays; `kept because …` is another."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a stage's result goes on, whether only `force` made it so, and why, in one sentence."""

    kept: bool
    forced: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        """What the ledger says of it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Look:
    """One thing that a stage buys: whether it was gained (None: not known), the figures, and whether it got worse."""

    gained: bool | None
    said: str
    worse: bool = False


def guard(
    scale: Scale, stage: Stage, before: Student, after: Student, folder: Path, notes: Mapping[str, Any] | None = None
) -> tuple[Side, Side, Decision | None]:
    """Weigh what a stage made against what it was given, and decide; no decision for a stage that buys nothing.

    `notes` are what the stage noted, in which `operators` says what it measured.

    Raises:
        StageError, TargetError, StoreError: as `weigh`.
    """
    sides = weigh(scale, before, after, folder)
    if not stage.buys:
        return *sides, None
    if before.quantization is None and after.quantization is not None and not float_forms(scale.target):
        why = f"kept because {scale.target.name} runs no float form, so the student is quantized in any case"
        return *sides, Decision(kept=True, forced=False, why=why)
    if (own := measured_gains(notes or {})) and not (sides[1].problem and not sides[0].problem):
        figures = "; ".join(JUDGES[name](*sides).said for name in stage.buys)
        why = f"kept because the stage measured a gain in the form that is to ship ({own}); as {sides[1].lowering}: "
        return *sides, Decision(kept=True, forced=False, why=why + figures)
    return *sides, decide(stage.buys, *sides, force=stage.force)


def measured_gains(notes: Mapping[str, Any]) -> str:
    """What an `operators` stage kept because it was measured to pay; nothing of what was forced or not measured."""
    kept = [
        f"{entry['operator']}: {str(entry['reason']).removeprefix(PAYS).strip()}"
        for entry in notes.get("operators", ())
        if entry["kept"] and "speedup" in entry and str(entry["reason"]).startswith(PAYS)
    ]
    return "; ".join(kept)


def decide(buys: Sequence[str], before: Side, after: Side, *, force: bool = False) -> Decision:
    """Judge a stage that buys at least one thing by the artifacts before and after it.

    What cannot be known does not count against the stage: it is kept, and the reason says so. But what cannot be made
    for the target any more is rolled back.
    """
    if after.problem and not before.problem:
        kept = "kept because of force, though" if force else "rolled back because"
        return Decision(kept=force, forced=force, why=f"{kept} it cannot be made for the target: {after.problem}")
    looks = {name: JUDGES[name](before, after) for name in buys}
    figures = "; ".join(look.said for look in looks.values() if look.said)
    gained = {name for name, look in looks.items() if look.gained}
    slower = bool(gained) and gained <= BYTES_ALONE and any(look.worse for look in looks.values())
    if gained and not slower:
        return Decision(kept=True, forced=False, why=figures)
    if not gained and any(look.gained is None for look in looks.values()):
        return Decision(kept=True, forced=False, why=f"kept though no gain is known: {figures}")
    reason = "fewer bytes made it slower" if slower else "nothing was gained"
    kept = f"kept because of force, though {reason}" if force else f"rolled back because {reason}"
    return Decision(kept=force, forced=force, why=f"{kept}: {figures}")


def _latency(before: Side, after: Side) -> Look:
    ratio, interval = after.latency.get("ratio"), after.latency.get("ratio_ci99")
    if ratio is None:
        reasons = dict.fromkeys(side.latency["reason"] for side in (before, after) if "reason" in side.latency)
        return Look(None, f"latency could not be measured ({'; '.join(reasons)})")
    figures = f"latency {before.latency['p50_ms']:.4g} → {after.latency['p50_ms']:.4g} ms, ratio {ratio:.3f}"
    if interval is None:
        kind = str(after.latency["kind"]).replace("_", " ")
        return Look(ratio < 1, f"{figures} ({kind}, no interval)", worse=ratio > CLEAR)
    low, high = interval
    return Look(high < 1, f"{figures} (99 % interval {low:.3f}–{high:.3f})", worse=low > CLEAR)


def _size(before: Side, after: Side) -> Look:
    return _bytes("size", before.size_bytes, after.size_bytes) or Look(None, "size is not known")


def _flash(before: Side, after: Side) -> Look:
    return _bytes("flash", before.flash_bytes, after.flash_bytes) or Look(False, "")


def _transfer(before: Side, after: Side) -> Look:
    look = _bytes("compressed size", before.compressed_bytes, after.compressed_bytes)
    if look is None:
        return Look(None, "compressed size is not known")
    stored = after.storage == "compressed"
    return look if stored else Look(False, f"{look.said}, but the device stores the plain file")


def _bytes(name: str, before: int | None, after: int | None) -> Look | None:
    """Whether a number of bytes fell enough to count; None if one is not known."""
    if before is None or after is None:
        return None
    change = after / before - 1
    told = f"{name} {before / 1e6:.2f} → {after / 1e6:.2f} MB ({change:+.1%})"
    return Look(after <= (1 - SMALLER) * before, told)


def _metric(before: Side, after: Side) -> Look:
    if before.metric is None or after.metric is None:
        return Look(None, "metric is not known")
    change = after.metric - before.metric
    low, high = after.metric_change_ci95 or (change, change)
    figures = f"metric {before.metric:.4f} → {after.metric:.4f} (95 % interval of the change {low:+.4f} to {high:+.4f}"
    tie = low <= 0 <= high
    figures += ", a tie)" if tie else ")"
    if before.divergence is None or after.divergence is None:
        return Look(None if tie else low > 0, figures)
    nearer = after.divergence < before.divergence
    figures += f", KL to the teacher {before.divergence:.4g} → {after.divergence:.4g}"
    return Look(nearer if tie else low > 0, figures)


JUDGES: dict[str, Callable[[Side, Side], Look]] = {
    "latency": _latency,
    "size": _size,
    "flash": _flash,
    "transfer": _transfer,
    "metric": _metric,
}
"""What a stage may buy, by the name it goes by in `buys`."""
BYTES_ALONE = frozenset(("flash", "transfer"))
"""What does not make up for a latency that got worse."""
