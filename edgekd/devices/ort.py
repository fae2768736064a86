"""ONNX Runtime on this machine: any execution provider its installation brings."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.devices import process
from edgekd.errors import StageError, TargetError
from edgekd.target import Target

run = process.run


@dataclass(frozen=True)
class Operator:
    """All operators of one type on one provider: `calls` and `ms` per inference, `share` of the whole time.

    A compiler that places operators without timing them leaves `ms` and `share` None.
    """

    type: str
    provider: str
    calls: float
    ms: float | None
    share: float | None


def available_providers() -> tuple[str, ...]:
    """Execution providers of the installed ONNX Runtime; none where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def unavailable(target: Target) -> str | None:
    """Why the target's providers cannot be used here, or None if they can."""
    available = available_providers()
    return lacking(target, available, where="here") if available else "onnxruntime is not installed"


def lacking(target: Target, available: Sequence[str], *, where: str) -> str | None:
    """Which of the target's providers are not among the `available` ones, in words, or None."""
    missing = [name for name in target.providers if name not in available]
    return f"ONNX Runtime has no {', '.join(missing)} {where} (it has {', '.join(available)})" if missing else None


def prepare(target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Session settings as plain data: the target's, then those of the model over them.

    Raises:
        TargetError: `provider_options` are for a provider that the target does not use.
    """
    merged = {**target.options, **options}
    given = target.options.get("provider_options", {})
    if stray := [name for name in given if name not in target.providers]:
        raise TargetError(
            f"target {target.name!r} has provider_options for {', '.join(stray)}, not among its providers"
        )
    return {
        "engine": "onnxruntime",
        "providers": [[name, dict(given.get(name, {}))] for name in target.providers],
        "threads": threads,
        "graph_optimization": merged.get("graph_optimization", "all"),
        "disabled_optimizers": list(merged.get("disabled_optimizers", ())),
        "config": {**target.options.get("config", {}), **options.get("config", {})},
    }


def placement(trace: Path, *, warm_runs: int) -> Sequence[Operator]:
    """Per operator type and provider, from a trace of ONNX Runtime's profiler without its first `warm_runs` runs."""
    events = json.loads(trace.read_text(encoding="utf-8"))
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    if len(runs) <= warm_runs:
        raise StageError(f"the trace holds {len(runs)} runs, {warm_runs} of them warm-up")
    count, start = len(runs) - warm_runs, runs[warm_runs]
    total: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= start:
            key = (arguments["op_name"], arguments.get("provider", "unknown"))
            total[key] += event["dur"] / 1000 / count
            calls[key] += 1 / count
    return rows(total, calls)


def rows(ms: Mapping[tuple[str, str], float], calls: Mapping[tuple[str, str], float]) -> Sequence[Operator]:
    """Operators by (type, provider), the most costly first, with their shares of all milliseconds."""
    everything = sum(ms.values()) or 1.0
    found = [Operator(*key, round(calls[key], 6), value, value / everything) for key, value in ms.items()]
    return sorted(found, key=lambda row: -(row.ms or 0.0))
