from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import host


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cpuinfo", "name", "features"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", "Xeon", {"avx2", "avx512f", "avx512_vnni"}),
        ("Features\t: fp asimd asimddp i8mm bf16\nModel\t: Pi 5\n", "Pi 5", {"neon", "dotprod", "i8mm", "arm_bf16"}),
    ],
)
def test_cpu_features_are_read_from_the_kernel(tmp_path: Path, cpuinfo: str, name: str, features: set[str]) -> None:
    root = machine(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert host.cpu_name(root) == name
    assert host.cpu_features(root) == features


def test_hyperthreads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "logical_cpus", lambda: (0, 1, 2, 3, 5))
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3", 5: "4-5"}
    files = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    assert host.physical_cores(machine(tmp_path, files)) == (0, 1, 5)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/pod/it\n", "sys/fs/cgroup/pod/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/not/mounted\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ({"proc/self/cgroup": "3:cpu:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_control_groups_limit_the_cores(
    tmp_path: Path, files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "logical_cpus", lambda: tuple(range(8)))
    assert host.usable_cores(machine(tmp_path, files)) == cores


def test_memory_is_the_lower_of_machine_and_control_group(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/meminfo": "MemTotal:  8388608 kB\n", "proc/self/cgroup": "0::/pod\n"})
    assert host.memory_mb(root) == 8192
    machine(tmp_path, {"sys/fs/cgroup/pod/memory.max": "1073741824\n"})
    assert host.memory_mb(root) == 1024


def test_a_system_that_says_nothing_still_has_a_core(tmp_path: Path) -> None:
    assert host.usable_cores(tmp_path) >= 1
    assert host.memory_mb(tmp_path) is None
    assert host.cpu_quota(tmp_path) is None
    assert host.governor(tmp_path) == ""
    assert host.cpu_name(tmp_path)


def test_the_quietest_cores_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([{0: 10, 1: 10, 2: 10}] * 2 + [{0: 30, 1: 11, 2: 15}])
    monkeypatch.setattr(host, "_busy_ticks", lambda: next(readings))
    assert host.quietest((0, 1, 2), 2, seconds=0) == (1, 2)
    assert host.quietest((0, 1), 2) == (0, 1)
