"""Runs artifacts of both engines in one process: what they answer, or how long they take, in turns.

    python runtime.py REQUEST.json

`engines` in the request is the file of `edgekd.latency.worker_engines`, so that every artifact is called in the same
way as edgekd's own. `logits` writes the answers of one artifact to all its examples. `time` goes through the same
examples with every artifact: a block is one artifact on all `picked` examples one after another, and all artifacts
take turns, in an order that rotates.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Examples, reason


class Loaded:
    """One artifact in memory, with the examples it runs on."""

    def __init__(self, spec: dict[str, Any], engines: dict[str, Any]) -> None:
        examples = Examples(Path(spec["inputs"]))
        picked = spec.get("picked") or range(len(examples))
        self.feeds = [examples.feeds(index) for index in picked]
        self.name = spec["name"]
        self.engine = engines[spec["session"].get("engine", "onnxruntime")](spec["session"], "")
        began = time.perf_counter()
        self.engine.load(spec["path"], self.feeds[0])
        self.load_ms = 1e3 * (time.perf_counter() - began)
        names = self._input_names()
        self.feeds = [{name: value for name, value in feeds.items() if name in names} for feeds in self.feeds]
        self.take()

    def _input_names(self) -> set[str]:
        """Optimizers may take inputs away."""
        if hasattr(self.engine, "compiled"):
            return {name for given in self.engine.compiled.inputs for name in given.names}
        return {given.name for given in self.engine.session.get_inputs()}

    @property
    def precision(self) -> str:
        """What OpenVINO computes floats in, of its own accord; empty for ONNX Runtime."""
        if not hasattr(self.engine, "compiled"):
            return ""
        return str(self.engine.compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def logits(self) -> Any:
        """The first output for every example [N, C]."""
        run = self.engine.compiled if hasattr(self.engine, "compiled") else None
        rows = [run(each)[0] if run else self.engine.session.run(None, each)[0] for each in self.feeds]
        return np.concatenate(rows)

    def take(self, settle: int = 0) -> list[float]:
        """Milliseconds of each example; `settle` runs before them are not counted."""
        self.engine.feeds = self.feeds[-1]
        for _ in range(settle):
            self.engine.infer()
        taken = []
        for feeds in self.feeds:
            self.engine.feeds = feeds
            taken.append(float(self.engine.take(1)[0]) / 1e6)
        return taken

    def warm_up(self, seconds: float) -> None:
        """Twice through all examples, and on until the time is over."""
        began, rounds = time.perf_counter(), 0
        while rounds < 2 or time.perf_counter() - began < seconds:
            self.take()
            rounds += 1


def load(request: dict[str, Any]) -> tuple[list[Loaded], dict[str, str]]:
    """All artifacts that load and run, and the reasons of those that do not."""
    engines, loaded, failed = _engines(request["engines"]), [], {}
    for spec in request["subjects"]:
        try:
            loaded.append(Loaded(spec, engines))
        except Exception as error:  # noqa: BLE001 - the reason is the result
            failed[spec["name"]] = reason(error)
    return loaded, failed


def time_all(request: dict[str, Any]) -> dict[str, Any]:
    """Blocks in turns; [blocks, examples] of milliseconds for each artifact, by name."""
    loaded, failed = load(request)
    for each in loaded:
        each.warm_up(request["warmup_seconds"])
    order = np.random.default_rng(request["seed"]).permutation(len(loaded)).tolist()
    taken: dict[str, list[list[float]]] = {each.name: [] for each in loaded}
    gc.collect()
    gc.disable()
    began, preempted = time.perf_counter(), _preemptions()
    for number in range(request["blocks"]):
        if number > 1 and time.perf_counter() - began > request["max_seconds"]:
            break
        shift = number % max(1, len(order))
        for index in order[shift:] + order[:shift]:
            taken[loaded[index].name].append(loaded[index].take(request["settle_runs"]))
    preempted = _preemptions() - preempted
    arrays: dict[str, Any] = {name: np.array(values) for name, values in taken.items()}
    np.savez(request["samples"], **arrays)
    return {"facts": _facts(loaded), "failed": failed, "preemptions": preempted}


def answer_all(request: dict[str, Any]) -> dict[str, Any]:
    """Logits of every artifact, by name."""
    loaded, failed = load(request)
    arrays: dict[str, Any] = {each.name: each.logits() for each in loaded}
    np.savez(request["samples"], **arrays)
    return {"facts": _facts(loaded), "failed": failed}


def _facts(loaded: list[Loaded]) -> dict[str, Any]:
    return {
        each.name: {"runtime": each.engine.version, "precision": each.precision, "load_ms": each.load_ms}
        for each in loaded
    }


def _engines(file: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("worker_engines", file)
    if spec is None or spec.loader is None:
        raise ImportError(file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engines: dict[str, Any] = module.ENGINES
    return engines


def _preemptions() -> int:
    """How often the system has taken a core away from this process so far."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("nonvoluntary_ctxt_switches"))


def main() -> None:
    """Do the job of the request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if request["cpus"]:
        os.sched_setaffinity(0, request["cpus"])
    result = {"time": time_all, "logits": answer_all}[request["job"]](request)
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
