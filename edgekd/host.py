"""What this machine is: cores a process may use, CPU features, memory, load.

Linux is read from `/proc` and `/sys`; elsewhere the portable fallbacks know less and say so by returning less.
`root` exists so that other machines can be described by a folder of files.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path("/")

# The kernel's word for a feature and ours; only what decides which kernels a runtime picks.
FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "arm_bf16",
    "sve": "sve",
}


def cpu_name(root: Path = ROOT) -> str:
    """The processor's name as the kernel gives it, else the architecture."""
    fields = _fields(_read(root / "proc/cpuinfo"))
    return fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()


def cpu_features(root: Path = ROOT) -> frozenset[str]:
    """The features among `FEATURES` that this CPU has; empty where they cannot be found out."""
    text = _read(root / "proc/cpuinfo")
    if not text and sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"neon", "dotprod"})
    return features_in(text)


def features_in(cpuinfo: str) -> frozenset[str]:
    """The features among `FEATURES` that the text of a machine's `/proc/cpuinfo` names."""
    fields = _fields(cpuinfo)
    words = (fields.get("flags") or fields.get("Features") or "").split()
    return frozenset(FEATURES[word] for word in words if word in FEATURES)


def physical_cores(root: Path = ROOT) -> tuple[int, ...]:
    """One logical CPU per physical core, among those this process may run on."""
    seen: dict[str, int] = {}
    for cpu in logical_cpus():
        siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        seen.setdefault(siblings or str(cpu), cpu)
    return tuple(seen.values())


def logical_cpus() -> tuple[int, ...]:
    """The logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores this process can keep busy: affinity and control-group limits taken into account."""
    cores = len(physical_cores(root))
    limit = cpu_quota(root)
    return cores if limit is None else max(1, min(cores, int(limit)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time the control group grants, the tightest of all its parents; None when unlimited."""
    limits = [limit for folder in _cgroup_folders(root) if (limit := _quota_of(folder)) is not None]
    return min(limits, default=None)


def memory_mb(root: Path = ROOT) -> int | None:
    """Memory of this machine in MiB, or the control group's limit where that is lower."""
    total = None
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) // 1024
    limits = [int(text) // 2**20 for folder in _cgroup_folders(root) if (text := _memory_limit(folder)).isdigit()]
    return min([*limits, *([total] if total is not None else [])], default=None)


def board(root: Path = ROOT) -> str:
    """What the device tree calls this machine: its `model` and `compatible` names; empty where there is none."""
    names = [_read(root / f"proc/device-tree/{key}") for key in ("model", "compatible")]
    return " ".join(" ".join(names).replace("\0", " ").split())


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def governor(root: Path = ROOT) -> str:
    """The frequency governor of the first core, or an empty string (common in virtual machines)."""
    return _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()


def quietest(cpus: Sequence[int], count: int, *, seconds: float = 0.1) -> tuple[int, ...]:
    """The `count` least busy of `cpus`, watched for a moment; the first ones where the system does not say."""
    if len(cpus) <= count or not _busy_ticks():
        return tuple(sorted(cpus[:count]))
    before = _busy_ticks()
    time.sleep(seconds)
    after = _busy_ticks()
    by_load = sorted(cpus, key=lambda cpu: (after.get(cpu, 0) - before.get(cpu, 0), cpu))
    return tuple(sorted(by_load[:count]))


def _busy_ticks() -> dict[int, int]:
    """Busy clock ticks per CPU since boot: everything of `/proc/stat` but idle and waiting for disks."""
    ticks = {}
    for line in _read(ROOT / "proc/stat").splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdigit():
            ticks[int(name[3:])] = sum(int(count) for count in (*counts[:3], *counts[5:8]))
    return ticks


def _fields(cpuinfo: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _cgroup_folders(root: Path) -> Iterable[Path]:
    """The control group folders that bind this process, from its own up to the root; versions 1 and 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        roots = [root / "sys/fs/cgroup" / part for part in controllers.split(",") if part in ("cpu", "memory")]
        for base in roots if controllers else [root / "sys/fs/cgroup"]:
            inner = Path(name.lstrip("/"))
            # Inside a container the path names a group of the host that is not mounted: its root is what binds.
            yield from (base / step for step in (inner, *inner.parents))


def _quota_of(folder: Path) -> float | None:
    quota, period = "", ""
    if text := _read(folder / "cpu.max"):
        quota, _, period = text.strip().partition(" ")
    elif text := _read(folder / "cpu.cfs_quota_us"):
        quota, period = text.strip(), _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _memory_limit(folder: Path) -> str:
    return (_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
