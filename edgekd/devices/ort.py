"""ONNX Runtime on this machine: any execution provider its installation brings."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import ModelError, StageError, TargetError
from edgekd.target import Target

# All that the measuring process inherits; anything else (OMP_*, MALLOC_*, LD_PRELOAD …) could change its speed.
INHERITED = (
    "PATH", "HOME", "LANG", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH",
)  # fmt: skip
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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
    if not available:
        return "onnxruntime is not installed"
    missing = [name for name in target.providers if name not in available]
    if missing:
        return f"ONNX Runtime has no {', '.join(missing)} here (it has {', '.join(available)})"
    return None


def prepare(target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Session settings as plain data: the target's, then those of the model over them."""
    merged = {**target.options, **options}
    return {
        "providers": list(target.providers),
        "threads": threads,
        "graph_optimization": merged.get("graph_optimization", "all"),
        "disabled_optimizers": list(merged.get("disabled_optimizers", ())),
        "config": {**target.options.get("config", {}), **options.get("config", {})},
    }


def run(target: Target, worker: Path, request: Mapping[str, Any], *, folder: Path, timeout: float) -> dict[str, Any]:
    """Run the worker in a process of its own, with an environment of its own.

    Raises:
        ModelError: a model does not load or run, or brings the process down.
        TargetError: it takes longer than `timeout` seconds.
        StageError: the worker itself failed.
    """
    asked, result = folder / "request.json", folder / "result.json"
    asked.write_text(json.dumps({**request, "result": str(result), "parent": os.getpid()}), encoding="utf-8")
    command = [sys.executable, str(worker), str(asked)]
    environment = worker_environment(threads=request["subjects"][0]["session"]["threads"])
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, timeout=timeout, check=False, text=True,
            errors="replace", stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        names = ", ".join(subject["name"] for subject in request["subjects"])
        raise TargetError(f"measuring {names} took longer than {timeout:.0f} s and was stopped") from None
    if done.returncode < 0:
        raise ModelError(f"ONNX Runtime crashed ({_signal_name(-done.returncode)}) on {_paths(request)}{_tail(done)}")
    if not result.is_file():
        raise StageError(f"the measuring process failed with exit code {done.returncode}{_tail(done)}")
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        raise ModelError(answer["error"])
    return answer


def placement(trace: Path, *, warm_runs: int) -> Sequence[Operator]:
    """Per operator type and provider, from a trace of ONNX Runtime's profiler without its first `warm_runs` runs."""
    events = json.loads(trace.read_text(encoding="utf-8"))
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    if len(runs) <= warm_runs:
        raise StageError(f"the trace holds {len(runs)} runs, {warm_runs} of them warm-up")
    count, start = len(runs) - warm_runs, runs[warm_runs]
    total: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= start:
            key = (arguments["op_name"], arguments.get("provider", "unknown"))
            total[key] += event["dur"] / 1000
            calls[key] += 1
    everything = sum(total.values()) or 1.0
    rows = [Operator(*key, calls[key] / count, ms / count, ms / everything) for key, ms in total.items()]
    return sorted(rows, key=lambda row: -(row.ms or 0.0))


def worker_environment(*, threads: int) -> dict[str, str]:
    """The environment of the measuring process."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    fixed = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    return {**kept, **fixed, **{name: str(threads) for name in THREAD_VARIABLES}}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _paths(request: Mapping[str, Any]) -> str:
    return ", ".join(subject["path"] for subject in request["subjects"])


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()][-8:]
    return "\n  " + "\n  ".join(lines) if lines else " and said nothing"
