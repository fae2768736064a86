"""Ways to run a model, one file each, behind one small protocol. Light: runtimes are imported when they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgekd import host
from edgekd.devices import ort
from edgekd.devices.ort import Operator
from edgekd.errors import TargetError, unknown
from edgekd.target import Target

__all__ = ["DEVICES", "Device", "Operator", "device_of", "unavailable"]


class Device(Protocol):
    """One way to run a model."""

    def unavailable(self, target: Target) -> str | None:
        """Why models cannot run on the target from here, or None if they can."""

    def prepare(self, target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """The session settings of one model as plain data for the worker; `options` go before the target's."""

    def run(self, worker: Path, request: Mapping[str, Any], *, folder: Path, timeout: float) -> dict[str, Any]:
        """Do a request of `edgekd.latency.bench` where the device is; files are exchanged through `folder`."""

    def placement(self, trace: Path, *, warm_runs: int) -> Sequence[Operator]:
        """Where the operators of a traced model ran and how long they took."""


DEVICES: dict[str, Device] = {"onnxruntime": ort}


def device_of(target: Target) -> Device:
    """The way to run models on a target.

    Raises:
        TargetError: the target's runtime is not known.
    """
    if target.runtime not in DEVICES:
        raise TargetError(f"target {target.name!r}: {unknown('runtime', target.runtime, DEVICES)}")
    return DEVICES[target.runtime]


def unavailable(target: Target) -> str | None:
    """Why the target cannot be measured from here, or None if it can."""
    features = host.cpu_features()
    lacking = [name for name in target.requires if name not in features]
    if lacking:
        return f"this CPU has no {', '.join(lacking)}"
    foreign = [name for name in target.excludes if name in features]
    if foreign:
        return f"this CPU has {', '.join(foreign)} and would be faster"
    return device_of(target).unavailable(target)
