"""The process that times models. With `worker_engines.py` beside it, it needs only numpy and the runtime's package.

    python worker.py request.json        (or the request on stdin)

The request names the models, their inputs (.npz), session settings and the CPUs to stay on (null: the worker takes the
last ones it may use); the result is written to `request["result"]` (JSON) and the raw samples beside it (.npz). See
`edgekd.latency.bench` for the fields. Boards have old Pythons: nothing here may need more than Python 3.8.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

SYSTEM = Path("/sys")
ERROR_EXIT = 3


class WorkerError(Exception):
    """What the user can fix, told in one message: the `model` does not load or run, or the `target` asks too much."""

    def __init__(self, message: str, *, of: str = "model") -> None:
        super().__init__(message)
        self.of = of


def main() -> int:
    """Read the request, do it, write the result; 0, or 3 when there is an error to tell."""
    source = sys.argv[1] if len(sys.argv) > 1 else "-"
    request = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
    try:
        request["cpus"] = _stay_on(request["cpus"], max(spec["session"]["threads"] for spec in request["subjects"]))
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        result = JOBS[request["job"]](request)
        result["host"] = dict(_machine(request["cpus"]), load=load, **result["host"])
        result["cpus"] = request["cpus"]
    except WorkerError as error:
        result = {"error": str(error), "of": error.of}
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
    before, preempted = _conditions(request["cpus"]), _preemptions()
    rounds = _take_rounds(subjects, request)
    preempted, after = _preemptions() - preempted, _conditions(request["cpus"])
    gc.enable()
    arrays: dict[str, Any] = {}
    for index, subject in enumerate(subjects):
        sizes = [len(block) for block in subject.taken]
        arrays[f"ms_{index}"] = np.concatenate(subject.taken) / 1e6
        arrays[f"block_{index}"] = np.repeat(np.arange(rounds), sizes)
    np.savez(request["samples"], **arrays)
    host = _host(subjects[0], before, after)
    return {"preemptions": preempted, "host": host, "subjects": [subject.facts() for subject in subjects]}


def weigh_model(request: dict[str, Any]) -> dict[str, Any]:
    """Load one model in this fresh process and run it a few times: load time, first inference, peak memory."""
    before = _conditions(request["cpus"])
    subject = Loaded(request["subjects"][0])
    for _ in range(3):
        subject.infer()
    host = _host(subject, before, _conditions(request["cpus"]))
    return {"peak_rss_mb": _peak_rss_mb(), "host": host, "subjects": [subject.facts()]}


def trace_model(request: dict[str, Any]) -> dict[str, Any]:
    """Run one model under the runtime's own profiler; the result names the trace file."""
    before = _conditions(request["cpus"])
    subject = Loaded(request["subjects"][0], trace=request["trace"])
    subject.warm_up(request["window_ms"], min(request["warmup_seconds"], subject.engine.trace_warm_up))
    warm_runs = subject.runs
    subject.engine.begin_trace(warm_runs)
    began = time.perf_counter()
    while subject.runs - warm_runs < request["runs"] and time.perf_counter() - began < request["max_seconds"]:
        subject.infer()
    host = _host(subject, before, _conditions(request["cpus"]))
    return {"trace": subject.engine.end_trace(subject.runs), "runs": subject.runs, "warm_runs": warm_runs, "host": host}


class Loaded:
    """One model in memory with its inputs."""

    def __init__(self, spec: dict[str, Any], *, trace: str = "") -> None:
        import numpy as np

        self.name = spec["name"]
        self.taken: list[Any] = []
        self.runs = 0
        self.settled = False
        self.typical_ns = 0
        self.block_runs = 1
        self.engine = _engines()[spec["session"].get("engine", "onnxruntime")](spec["session"], trace)
        path, title = spec["path"], self.engine.title
        with np.load(spec["feeds"]) as archive:
            feeds = {key: np.asarray(archive[key], order="C") for key in archive.files}
        began = time.perf_counter_ns()
        try:
            self.engine.load(path, feeds)
        except Exception as error:
            raise WorkerError(f"{title} cannot load {path}: {_first_line(error)}") from error
        self.load_ms = (time.perf_counter_ns() - began) / 1e6
        if self.engine.lacking():
            raise WorkerError(f"{title} could not use {', '.join(self.engine.lacking())} for {path}")
        began = time.perf_counter_ns()
        try:
            self.infer()
        except Exception as error:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feeds.items())
            raise WorkerError(f"{title} cannot run {path} on {shapes}: {_first_line(error)}") from error
        self.first_ms = (time.perf_counter_ns() - began) / 1e6

    def infer(self) -> None:
        """One inference."""
        self.engine.infer()
        self.runs += 1

    def take(self, count: int) -> Any:
        """Time `count` inferences one by one, in nanoseconds [count]."""
        taken = self.engine.take(count)
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


def _engines() -> Any:
    """The table of the file beside this one, which is found wherever both were copied to."""
    spec = importlib.util.spec_from_file_location("worker_engines", Path(__file__).with_name("worker_engines.py"))
    if spec is None or spec.loader is None:
        raise ImportError("worker_engines.py is not beside worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ENGINES


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
        if request.get("parent") and os.getppid() != request["parent"]:
            raise WorkerError("the process that asked for this measurement is gone")
        shift = number % len(order)
        for index in order[shift:] + order[:shift]:
            for _ in range(settle):
                subjects[index].infer()
            subjects[index].taken.append(subjects[index].take(subjects[index].block_runs))
    return int(request["blocks"])


def _stay_on(cpus: list[int] | None, threads: int) -> list[int]:
    """Pin this process to `cpus`, or to the last ones it may use: on boards of two kinds of cores the fast ones."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if cpus is None:
        if threads > len(allowed):
            raise WorkerError(
                f"{threads} threads asked, but only {len(allowed)} CPUs are there: ask for fewer", of="target"
            )
        cpus = allowed[-threads:]
    if missing := sorted(set(cpus) - set(allowed)):
        raise WorkerError(f"CPUs {missing} are not among those that may be used: {allowed}", of="target")
    if cpus:
        os.sched_setaffinity(0, cpus)
    return cpus


def _host(subject: Loaded, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What may change from one measurement to the next, see `Samples.facts`."""
    facts = {
        f"{key}_{when}": value for when, now in (("before", before), ("after", after)) for key, value in now.items()
    }
    return dict(facts, runtime=subject.engine.version)


def _machine(cpus: list[int]) -> dict[str, Any]:
    """What stays as it is on this machine."""
    fields = dict(line.split(":", 1) for line in _text(Path("/proc/cpuinfo")).splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    highest = _frequencies(cpus, "cpuinfo_max_freq")
    return {
        "cpu": names.get("model name") or names.get("Model") or names.get("Hardware") or platform.machine(),
        "governor": _text(SYSTEM / f"devices/system/cpu/cpu{(cpus or [0])[0]}/cpufreq/scaling_governor").strip()
        or None,
        "python": platform.python_version(),
        "max_mhz": min(highest) if highest else None,
    }


def _conditions(cpus: list[int]) -> dict[str, Any]:
    """The machine right now: hottest zone in °C, slowest of the CPUs used in MHz; None where it does not say."""
    zones = [_text(file).strip() for file in SYSTEM.glob("class/thermal/thermal_zone*/temp")]
    degrees = [int(zone) / 1000 for zone in zones if zone.lstrip("-").isdigit() and -50_000 < int(zone) < 200_000]
    current = _frequencies(cpus, "scaling_cur_freq")
    return {"celsius": max(degrees, default=None), "mhz": min(current, default=None)}


def _frequencies(cpus: list[int], file: str) -> list[float]:
    read = [_text(SYSTEM / f"devices/system/cpu/cpu{cpu}/cpufreq/{file}").strip() for cpu in cpus or [0]]
    return [int(kilohertz) / 1000 for kilohertz in read if kilohertz.isdigit()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_line(error: Exception) -> str:
    """The first line that says something: OpenVINO begins with where in its sources the error arose."""
    empty = ("Exception from ", "Check '", "FrontEnd API failed", "Model wasn't fully converted", "Summary:")
    lines = [line.strip().lstrip("- ") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(empty)]
    return (telling or lines or [type(error).__name__])[0]


def _preemptions() -> int:
    """How often the system has taken a core away from this process so far."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _peak_rss_mb() -> float | None:
    """Peak memory of this process in MiB; ru_maxrss would start at the parent's size after fork and exec on Linux."""
    status = _text(Path("/proc/self/status")).splitlines()
    peaks = [int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:")]
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
