"""What each stage bought: before and after, with intervals, kept or rolled back. Ledgers of before it have nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = (
    "stage",
    "",
    "latency p50 (95 % interval)",
    "after / before (99 % interval)",
    "size",
    "metric (95 % interval)",
)


def gains(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each stage that was weighed: `cells` under `HEADINGS`, one `line` for a terminal, `why`.

    `remark` says whether `why` tells more than the figures: nothing gained, no latency known, or kept for a reason.
    """
    return [_row(entry) for entry in manifest["ledger"] if "before" in entry and "after" in entry]


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    name, said, why = str(entry["stage"]), decision(entry), str(entry.get("why", ""))
    sides = entry["before"], entry["after"]
    ratio, size = _ratio(sides[1]["latency"]), _sizes(*sides)
    remark = said != "kept" or not ratio or why.startswith("kept ")
    p50 = _change([side["latency"].get("p50_ms") for side in sides], ".3f", " ms")
    metric = _change([side.get("metric") for side in sides], ".4f", " on validation")
    figures = [p50 and f"p50 {p50}", ratio and f"ratio {ratio}", size, metric]
    return {
        "stage": name,
        "cells": (name, said, _latency(*sides), ratio, size, _metric(*sides)),
        "line": f"{name}: {why}" if why and remark else f"{name}: {', '.join(filter(None, [said, *figures]))}",
        "why": why,
        "remark": remark and bool(why),
    }


def decision(entry: Mapping[str, Any]) -> str:
    """`kept`, `kept by force`, `rolled back`, or nothing for a stage that is not guarded."""
    if "kept" not in entry:
        return ""
    return "kept by force" if entry.get("forced") else "kept" if entry["kept"] else "rolled back"


def shared(manifest: Mapping[str, Any], targets: int) -> list[str]:
    """A sentence on each stage that was done once for all targets."""
    by = f", shared by {targets} targets" if targets > 1 else ""
    return [
        f"{entry['stage']}: trained once in {entry['seconds']:.0f} s{by}"
        for entry in manifest["ledger"]
        if entry.get("shared")
    ]


def _latency(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    sides = before["latency"], after["latency"]
    if all(side.get("p50_ms") is None for side in sides):
        return f"unavailable: {sides[1].get('reason', '')}"
    told = [_with(side.get("p50_ms"), side.get("ci95_ms"), ".3f") for side in sides]
    kind = next(str(side["kind"]) for side in sides if side.get("p50_ms") is not None)
    return f"{' → '.join(told)} ms" + ("" if kind == "measured" else f" ({kind.replace('_', ' ')})")


def _ratio(latency: Mapping[str, Any]) -> str:
    return "" if latency.get("ratio") is None else _with(latency["ratio"], latency.get("ratio_ci99"), ".3f")


def _metric(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return " → ".join(_with(side.get("metric"), side.get("metric_ci95"), ".4f") for side in (before, after))


def _with(value: float | None, interval: Any, form: str) -> str:
    """A figure with its interval behind it; `?` where it is not known, `∞` for an end that is not bounded."""
    if value is None:
        return "?"
    if not interval:
        return f"{value:{form}}"
    low, high = (f"{end:{form}}" if end is not None else "∞" for end in interval)
    return f"{value:{form}} ({low}–{high})"


def _change(sides: Sequence[float | None], form: str, unit: str) -> str:
    told = ["?" if value is None else f"{value:{form}}" for value in sides]
    return "" if all(value is None for value in sides) else f"{' → '.join(told)}{unit}"


def _sizes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The files' sizes; compressed and in flash too where zeros made a difference that the plain file does not show."""
    told = [_megabytes("size_bytes", before, after)]
    if before.get("size_bytes") == after.get("size_bytes"):
        told += [f"{name} {size}" for name, key in HIDDEN if (size := _megabytes(key, before, after))]
    return "; ".join(filter(None, told))


HIDDEN = (("compressed", "compressed_bytes"), ("flash", "flash_bytes"))


def _megabytes(key: str, *sides: Mapping[str, Any]) -> str:
    sizes = [side.get(key) for side in sides]
    return _change([None if size is None else size / 1e6 for size in sizes], ".2f", " MB")
