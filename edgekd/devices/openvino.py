"""OpenVINO on this machine: its CPU plugin, and its GPU and NPU plugins where they find a device."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.devices import process
from edgekd.devices.ort import Operator, rows
from edgekd.target import Target

MISSING = "openvino is not installed: pip install 'edgekd[openvino]'"

run = process.run


def available_devices() -> tuple[str, ...]:
    """Devices that the installed OpenVINO finds, as CPU, GPU, GPU.1, NPU; none where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return ()
    import openvino

    return tuple(openvino.Core().available_devices)


def unavailable(target: Target) -> str | None:
    """Why the target's device cannot be used here, or None if it can."""
    available = available_devices()
    return lacking(target, available, where="here") if available else MISSING


def lacking(target: Target, available: Sequence[str], *, where: str) -> str | None:
    """What to say if the target's device is not among the `available` ones, else None; `GPU` stands for `GPU.0`."""
    device = _device(target)
    if device in {name for found in available for name in (found, found.split(".")[0])}:
        return None
    return f"OpenVINO finds no {device} {where} (it finds {', '.join(available)})"


def prepare(target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Session settings as plain data. `options` come with a model for ONNX Runtime, and mean nothing here.

    OpenVINO computes in bf16 on its own accord where the CPU can, which costs accuracy: it is told f32 unless the
    target asks otherwise.
    """
    device, config = _device(target), {"PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        config["INFERENCE_NUM_THREADS"] = str(threads)
    if "precision" in target.options or not device.startswith("NPU"):
        # The NPU compiler chooses among what its hardware has, and knows no f32.
        config["INFERENCE_PRECISION_HINT"] = target.options.get("precision", "f32")
    return {
        "engine": "openvino",
        "device": device,
        "threads": threads,
        "static": target.shapes == "static",
        "config": {**config, **target.options.get("config", {})},
    }


def placement(trace: Path, *, warm_runs: int) -> Sequence[Operator]:
    """Per node type, from the averages that the worker wrote; nodes that were fused into others do not appear."""
    told = json.loads(trace.read_text(encoding="utf-8"))
    total: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], float] = defaultdict(float)
    for node in told["nodes"]:
        total[node["type"], told["device"]] += node["us"] / 1000
        calls[node["type"], told["device"]] += 1
    return rows(total, calls)


def _device(target: Target) -> str:
    return str(target.options.get("device", "CPU"))
