"""Ways to run or compile a model, one file each, behind two small protocols. Light: runtimes are imported when used.

A `Device` runs models, here or on a board, and its latencies are measured. A `Compiler` is a vendor's ahead-of-time
compiler that states a latency of its own: a vendor estimate, which is never mixed with a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgekd import host
from edgekd.devices import adb, ethos_u, openvino, ort, qualcomm, remote, ssh
from edgekd.devices.ort import Operator
from edgekd.errors import TargetError, unknown
from edgekd.target import Target, probe

__all__ = [
    "COMPILERS", "DEVICES", "REACHES", "Compiler", "Device", "Estimate", "Operator",
    "compiler_of", "device_of", "is_estimated", "unavailable", "usual_threads",
]  # fmt: skip


class Device(Protocol):
    """One way to run a model."""

    def unavailable(self, target: Target) -> str | None:
        """Why models cannot run on the target from here, or None if they can."""

    def prepare(self, target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """The session settings of one model as plain data for the worker; `options` go before the target's."""

    def run(
        self, target: Target, worker: Path, request: Mapping[str, Any], *, folder: Path, timeout: float
    ) -> dict[str, Any]:
        """Do a request of `edgekd.latency.bench` where the device is; files are exchanged through `folder`."""

    def placement(self, trace: Path, *, warm_runs: int) -> Sequence[Operator]:
        """Where the operators of a traced model ran and how long they took."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a vendor's compiler says of one model: `ms` per inference, in milliseconds, with its own bounds if any.

    `files` are what it made for the device, in the folder that was given. `operators` say what runs where (without
    times where the compiler gives none). `figures` are the vendor's other numbers under the vendor's names, `options`
    everything the estimate depends on, versions included, and `caveat` the vendor's own words on what it is worth.
    """

    ms: float
    low_ms: float | None = None
    high_ms: float | None = None
    cycles: float | None = None
    files: tuple[Path, ...] = ()
    operators: tuple[Operator, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    caveat: str = ""
    notes: tuple[str, ...] = ()


class Compiler(Protocol):
    """A vendor's ahead-of-time compiler."""

    def unavailable(self, target: Target) -> str | None:
        """Why models cannot be compiled here, or None if they can."""

    def compile(self, target: Target, model: Path, folder: Path, *, timeout: float) -> Estimate:
        """Compile a model that is in the target's form (static shapes, its precision) into `folder`.

        Raises:
            ModelError: the model is in another form, or has operators that the device does not run.
            TargetError: it takes longer than `timeout` seconds.
        """


DEVICES: dict[str, Device] = {"onnxruntime": ort, "openvino": openvino}
REACHES: dict[str, Device] = {"ssh": ssh, "adb": adb}
COMPILERS: dict[str, Compiler] = {"ethos-u": ethos_u, "qualcomm": qualcomm}


def is_estimated(target: Target) -> bool:
    """Whether latencies of this target are a vendor's estimates instead of measurements."""
    return target.runtime in COMPILERS


def device_of(target: Target) -> Device:
    """The way to run models on a target.

    Raises:
        TargetError: the target's runtime is not known, or only compiles.
    """
    if target.reach_by != "local":
        return REACHES[target.reach_by]
    if target.runtime in COMPILERS:
        raise TargetError(f"target {target.name!r}: {target.runtime} compiles models, it does not run them here")
    if target.runtime not in DEVICES:
        raise TargetError(f"target {target.name!r}: {unknown('runtime', target.runtime, (*DEVICES, *COMPILERS))}")
    return DEVICES[target.runtime]


def compiler_of(target: Target) -> Compiler:
    """The compiler of a target whose latencies are estimates.

    Raises:
        TargetError: the target's runtime is none.
    """
    if target.runtime not in COMPILERS:
        raise TargetError(f"target {target.name!r}: {unknown('compiler', target.runtime, COMPILERS)}")
    return COMPILERS[target.runtime]


def usual_threads(target: Target) -> int:
    """Threads of one inference where nobody asks for another number: the target's, else one for each CPU there.

    A board is asked, so `unavailable` must have found nothing against it.
    """
    if target.threads or target.cpus:
        return target.threads or len(target.cpus)
    if is_estimated(target):
        return 1
    return probe(target).threads or 1 if target.reach_by == "local" else remote.usable_cpus(target)


def unavailable(target: Target) -> str | None:
    """Why the target can be neither measured nor estimated from here, or None if it can."""
    if is_estimated(target):
        return compiler_of(target).unavailable(target)
    if target.reach_by == "local":
        if target.board and target.board not in host.board():
            way = "say how to reach one with `reach: {ssh: {host: …}}` in a copy of its target file"
            return f"this machine is not the target's board ({target.board}); run edgekd there, or {way}"
        features = host.cpu_features()
        lacking = [name for name in target.requires if name not in features]
        if lacking:
            return f"this CPU has no {', '.join(lacking)}"
        foreign = [name for name in target.excludes if name in features]
        if foreign:
            return f"this CPU has {', '.join(foreign)} and would be faster"
    return device_of(target).unavailable(target)
