"""The process that times models: one file that needs only numpy and onnxruntime, so it can be copied to any board.

    python worker.py request.json        (or the request on stdin)

The request names the models, their inputs (.npz), session settings and the CPUs to stay on; the result is written
to `request["result"]` (JSON) and the raw samples beside it (.npz). See `edgekd.latency.bench` for the fields.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LEVELS = {"disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED"}
ERROR_EXIT = 3


class WorkerError(Exception):
    """A model that does not load or run: the user's to fix, told in one message."""


def main() -> int:
    """Read the request, do it, write the result; 0, or 3 when a model does not load or run."""
    source = sys.argv[1] if len(sys.argv) > 1 else "-"
    request = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
    if hasattr(os, "sched_setaffinity") and request["cpus"]:
        os.sched_setaffinity(0, request["cpus"])
    try:
        result = JOBS[request["job"]](request)
    except WorkerError as error:
        result = {"error": str(error)}
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")
    return ERROR_EXIT if "error" in result else 0


def time_models(request: dict[str, Any]) -> dict[str, Any]:
    """Load and warm up every model, then time them in turns, a short block each."""
    import numpy as np

    subjects = [Loaded(spec) for spec in request["subjects"]]
    for subject in subjects:
        subject.warm_up(request["window_ms"], request["warmup_seconds"])
        subject.plan(request["block_ms"], request["min_runs"], request["blocks"])
    gc.collect()
    gc.disable()
    preempted = _preemptions()
    rounds = _take_rounds(subjects, request)
    gc.enable()
    arrays: dict[str, Any] = {}
    for index, subject in enumerate(subjects):
        sizes = [len(block) for block in subject.taken]
        arrays[f"ms_{index}"] = np.concatenate(subject.taken) / 1e6
        arrays[f"block_{index}"] = np.repeat(np.arange(rounds), sizes)
    np.savez(request["samples"], **arrays)
    return {"preemptions": _preemptions() - preempted, "subjects": [subject.facts() for subject in subjects]}


def weigh_model(request: dict[str, Any]) -> dict[str, Any]:
    """Load one model in this fresh process and run it a few times: load time, first inference, peak memory."""
    subject = Loaded(request["subjects"][0])
    for _ in range(3):
        subject.infer()
    return {"peak_rss_mb": _peak_rss_mb(), "subjects": [subject.facts()]}


def trace_model(request: dict[str, Any]) -> dict[str, Any]:
    """Run one model under ONNX Runtime's profiler; the result names the trace file."""
    subject = Loaded(request["subjects"][0], trace=request["trace"])
    subject.warm_up(request["window_ms"], request["warmup_seconds"])
    warm_runs = subject.runs
    began = time.perf_counter()
    while subject.runs - warm_runs < request["runs"] and time.perf_counter() - began < request["max_seconds"]:
        subject.infer()
    return {"trace": subject.session.end_profiling(), "runs": subject.runs, "warm_runs": warm_runs}


class Loaded:
    """One model in memory with its inputs, called as a user would: `session.run(None, feeds)`."""

    def __init__(self, spec: dict[str, Any], *, trace: str = "") -> None:
        import numpy as np
        import onnxruntime

        self.name = spec["name"]
        self.taken: list[Any] = []
        self.runs = 0
        self.settled = False
        self.typical_ns = 0
        self.block_runs = 1
        options = _session_options(onnxruntime, spec["session"], trace)
        with np.load(spec["feeds"]) as archive:
            self.feeds = {key: np.ascontiguousarray(archive[key]) for key in archive.files}
        began = time.perf_counter_ns()
        try:
            self.session = onnxruntime.InferenceSession(
                spec["path"],
                options,
                providers=spec["session"]["providers"],
                disabled_optimizers=spec["session"]["disabled_optimizers"] or None,
            )
        except Exception as error:
            raise WorkerError(f"ONNX Runtime cannot load {spec['path']}: {_first_line(error)}") from error
        self.load_ms = (time.perf_counter_ns() - began) / 1e6
        missing = set(spec["session"]["providers"]) - set(self.session.get_providers())
        if missing:
            raise WorkerError(f"ONNX Runtime could not use {', '.join(sorted(missing))} for {spec['path']}")
        began = time.perf_counter_ns()
        try:
            self.infer()
        except Exception as error:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in self.feeds.items())
            raise WorkerError(f"ONNX Runtime cannot run {spec['path']} on {shapes}: {_first_line(error)}") from error
        self.first_ms = (time.perf_counter_ns() - began) / 1e6

    def infer(self) -> None:
        """One inference."""
        self.session.run(None, self.feeds)
        self.runs += 1

    def take(self, count: int) -> Any:
        """Time `count` inferences one by one, in nanoseconds [count]."""
        import numpy as np

        run, feeds, clock = self.session.run, self.feeds, time.perf_counter_ns
        taken = np.empty(count, dtype=np.int64)
        for index in range(count):
            began = clock()
            run(None, feeds)
            taken[index] = clock() - began
        self.runs += count
        return taken

    def warm_up(self, window_ms: float, seconds: float) -> None:
        """Run until the medians of three windows in a row lie within 2 %, or for `seconds`."""
        import numpy as np

        began = time.perf_counter()
        size = max(5, min(10_000, int(window_ms * 1e6 / max(1, int(self.take(1)[0]))) + 1))
        recent: list[float] = []
        while not self.settled and time.perf_counter() - began < seconds:
            recent = [*recent, float(np.median(self.take(size)))][-3:]
            self.settled = len(recent) == 3 and max(recent) <= 1.02 * min(recent)
        self.typical_ns = int(recent[-1] if recent else self.take(1)[0])

    def plan(self, block_ms: float, min_runs: int, blocks: int) -> None:
        """Choose the inferences of one block: enough for `block_ms`, and for `min_runs` in all."""
        self.block_runs = max(1, -(-min_runs // blocks), round(block_ms * 1e6 / max(1, self.typical_ns)))

    def facts(self) -> dict[str, Any]:
        """What is known besides the samples."""
        return {"name": self.name, "load_ms": self.load_ms, "first_ms": self.first_ms, "settled": self.settled}


def _take_rounds(subjects: list[Loaded], request: dict[str, Any]) -> int:
    """Blocks of all subjects in a seeded, rotating order; ends early at the time limit. Returns the rounds taken."""
    import numpy as np

    order = np.random.default_rng(request["seed"]).permutation(len(subjects)).tolist()
    # After another model has run, its weights have to come back into the caches: that is not what is asked.
    settle = request["settle_runs"] if len(subjects) > 1 else 0
    began = time.perf_counter()
    for number in range(request["blocks"]):
        if number > 1 and time.perf_counter() - began > request["max_seconds"]:
            return number
        if os.getppid() != request["parent"] and request["parent"]:
            raise WorkerError("the process that asked for this measurement is gone")
        shift = number % len(order)
        for index in order[shift:] + order[:shift]:
            for _ in range(settle):
                subjects[index].infer()
            subjects[index].taken.append(subjects[index].take(subjects[index].block_runs))
    return int(request["blocks"])


def _session_options(onnxruntime: Any, session: dict[str, Any], trace: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = session["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = LEVELS.get(session["graph_optimization"], "ORT_ENABLE_ALL")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for key, value in session["config"].items():
        options.add_session_config_entry(key, value)
    if trace:
        options.enable_profiling = True
        options.profile_file_prefix = trace
    return options


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _preemptions() -> int:
    """How often the system has taken a core away from this process so far."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _peak_rss_mb() -> float | None:
    """Peak memory of this process in MiB; ru_maxrss would start at the parent's size after fork and exec on Linux."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _maxrss_mb()
    peaks = [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return peaks[0] if peaks else _maxrss_mb()


def _maxrss_mb() -> float | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


JOBS = {"time": time_models, "weigh": weigh_model, "trace": trace_model}

if __name__ == "__main__":
    sys.exit(main())
