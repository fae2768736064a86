"""Under which conditions figures were taken: whatever else they may depend on, as plain data."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgekd import host
from edgekd.files import sha256_file
from edgekd.latency.bench import Settings
from edgekd.latency.plain import plain
from edgekd.latency.stats import Samples
from edgekd.latency.workload import Workload

# Distributions whose version may change a latency.
RUNTIMES = (
    "edgekd", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-qnn",
    "onnxruntime-openvino", "openvino", "ethos-u-vela",
)  # fmt: skip


def conditions(
    workload: Workload, models: Mapping[str, Path], settings: Settings, samples: Sequence[Samples]
) -> dict[str, Any]:
    """What a reader needs to repeat a profile; `machine` is the one that ran the models, as far as it is known."""
    target = workload.target
    facts = dict(getattr(samples[0], "facts", {})) if samples else {}
    local = target.reach_by == "local"
    machine = {"cpu": host.cpu_name(), "system": platform.platform(), "cores": host.usable_cores()} if local else {}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "models": {name: _file(path) for name, path in models.items()},
        "target": {"name": target.name, "runtime": target.runtime, "providers": list(target.providers),
                   "options": plain(target.options), "fingerprint": target.fingerprint, "reached": target.reach_by},
        "threads": samples[0].threads if samples else workload.threads,
        "cpus": list(samples[0].cpus) if samples else list(workload.cpus),
        "session": plain(workload.session),
        "inputs": {"made": workload.feeds is None, "seed": workload.seed, "shapes": plain(workload.shapes),
                   "values": plain(workload.values), "file": None if workload.feeds is None else str(workload.feeds)},
        "settings": plain(vars(settings)),
        "machine": {**machine, **plain(facts)},
        "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, edgekd and the runtimes that are installed here."""
    found = {"python": platform.python_version()}
    for name in RUNTIMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _file(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
