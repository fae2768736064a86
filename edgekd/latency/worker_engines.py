"""The runtimes that the worker can load models with; like `worker.py` it is copied to boards and stays at Python 3.8.

An engine takes session settings, loads one model with its inputs, runs it, says what it was asked but did not take
(`lacking`), and traces its operators if it was given a place for that (`trace`, a path without its ending). Each times
itself (`take`, in nanoseconds [count]), so that nothing but the call a user would write lies between two readings.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

LEVELS = {"disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED"}


class OnnxRuntime:
    """A session of ONNX Runtime, called as a user would: `session.run(None, feeds)`."""

    title = "ONNX Runtime"
    trace_warm_up = 60.0

    def __init__(self, session: dict[str, Any], trace: str) -> None:
        import onnxruntime

        self.runtime, self.version = onnxruntime, "onnxruntime " + onnxruntime.__version__
        self.disabled = session["disabled_optimizers"] or None
        self.providers = [(name, dict(options)) for name, options in session["providers"]]
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = session["threads"]
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3
        level = LEVELS.get(session["graph_optimization"], "ORT_ENABLE_ALL")
        self.options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        for key, value in session["config"].items():
            self.options.add_session_config_entry(key, value)
        if trace:
            self.options.enable_profiling = True
            self.options.profile_file_prefix = trace

    def load(self, path: str, feeds: dict[str, Any]) -> None:
        """Load a model to be run on `feeds`."""
        self.feeds = feeds
        self.session = self.runtime.InferenceSession(
            path, self.options, providers=self.providers, disabled_optimizers=self.disabled
        )

    def infer(self) -> None:
        """One inference."""
        self.session.run(None, self.feeds)

    def take(self, count: int) -> Any:
        """Time inferences one by one."""
        import numpy as np

        run, feeds, clock = self.session.run, self.feeds, time.perf_counter_ns
        taken = np.empty(count, dtype=np.int64)
        for index in range(count):
            began = clock()
            run(None, feeds)
            taken[index] = clock() - began
        return taken

    def lacking(self) -> list[str]:
        """What was asked but not taken: a provider that cannot start leaves its work to others without an error."""
        return sorted({name for name, _ in self.providers} - set(self.session.get_providers()))

    def begin_trace(self, runs: int) -> None:
        """Nothing to do: its profiler writes every run by itself."""

    def end_trace(self, runs: int) -> str:
        """The name of the trace file."""
        return str(self.session.end_profiling())


class OpenVino:
    """A model compiled by OpenVINO, called as a user would: `compiled(feeds)`, which copies results as `run` does."""

    title = "OpenVINO"
    # It only gives averages in whole microseconds since loading: few runs before the traced ones keep them exact.
    trace_warm_up = 0.0

    def __init__(self, session: dict[str, Any], trace: str) -> None:
        import openvino

        self.core, self.version = openvino.Core(), "openvino " + openvino.get_version()
        self.session, self.trace = session, trace
        self.config = dict(session["config"], **({"PERF_COUNT": "YES"} if trace else {}))

    def load(self, path: str, feeds: dict[str, Any]) -> None:
        """Read and compile a model to be run on `feeds`."""
        self.feeds = feeds
        model = self.core.read_model(path)
        for given in model.inputs:
            names = given.names & set(feeds)
            # It would run on zeros in place of a missing input, and convert one of another type at every inference.
            if not names:
                raise ValueError("no values for the input " + given.any_name)
            value = feeds[names.pop()]
            if value.dtype != given.element_type.to_dtype():
                raise ValueError(f"the input {given.any_name} is {given.element_type.to_dtype()}, got {value.dtype}")
        if self.session["static"]:
            model.reshape({name: list(value.shape) for name, value in feeds.items()})
        self.compiled = self.core.compile_model(model, self.session["device"], self.config)
        self.request: Any = self.compiled.create_infer_request() if self.trace else None

    def infer(self) -> None:
        """One inference; of the request that is traced, if one is."""
        if self.trace:
            self.request.infer(self.feeds, share_inputs=True)
        else:
            self.compiled(self.feeds)

    def take(self, count: int) -> Any:
        """Time inferences one by one."""
        import numpy as np

        run, feeds, clock = self.request.infer if self.trace else self.compiled, self.feeds, time.perf_counter_ns
        taken = np.empty(count, dtype=np.int64)
        for index in range(count):
            began = clock()
            run(feeds)
            taken[index] = clock() - began
        return taken

    def lacking(self) -> list[str]:
        """Settings that OpenVINO replaced by others without an error."""
        if "INFERENCE_PRECISION_HINT" not in self.config:
            return []
        taken = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        asked = self.config["INFERENCE_PRECISION_HINT"]
        return [] if taken == asked else [f"{asked} (it took {taken})"]

    def begin_trace(self, runs: int) -> None:
        """Remember the averages so far, to take them off at the end."""
        self.warm_runs, self.warm = runs, self._averages()

    def end_trace(self, runs: int) -> str:
        """Write microseconds per inference of every executed node; the name of that file."""
        count, file = runs - self.warm_runs, Path(self.trace + ".json")
        nodes = []
        for (name, kind, kernel), average in self._averages().items():
            microseconds = (average * runs - self.warm.get((name, kind, kernel), 0.0) * self.warm_runs) / max(1, count)
            nodes.append({"name": name, "type": kind, "kernel": kernel, "us": max(0.0, microseconds)})
        devices = self.compiled.get_property("EXECUTION_DEVICES")
        file.write_text(json.dumps({"engine": "openvino", "device": ",".join(devices), "nodes": nodes}))
        return str(file)

    def _averages(self) -> dict[tuple[str, str, str], float]:
        rows = [row for row in self.request.get_profiling_info() if row.status.name == "EXECUTED"]
        return {(row.node_name, row.node_type, row.exec_type): row.real_time.total_seconds() * 1e6 for row in rows}


ENGINES: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
