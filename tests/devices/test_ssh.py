"""A board that is this machine, behind a real sshd with keys of its own; and what needs no sshd."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.devices import remote, ssh
from edgekd.errors import ModelError, TargetError
from edgekd.latency import profile
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.target import Target, load_target

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
QUICK = Settings(blocks=12, block_ms=0.1, min_runs=120, max_seconds=5.0, window_ms=1.0, warmup_seconds=0.2)
LONG = Settings(blocks=100_000, block_ms=20.0, max_seconds=120.0, warmup_seconds=0.2)


@dataclass
class Server:
    """A running sshd and what it takes to log in."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def board(self) -> Path:
        return self.folder / "board"

    def target(self, **reach: Any) -> Path:
        """The path of a target file that reaches it; `reach` replaces settings."""
        settings = {
            "host": "127.0.0.1", "port": self.port, "user": getpass.getuser(), "identity": self.folder / "user",
            "known_hosts": self.folder / "known_hosts", "python": sys.executable, "folder": self.board, **reach,
        }  # fmt: skip
        rows = [f"    {key}: {str(value) if key == 'port' else repr(str(value))}" for key, value in settings.items()]
        head = ["title: board", "runtime: onnxruntime", "device: cpu", "precisions: [fp32]", "threads: 1", "source: t"]
        path = self.folder / "board.yaml"
        path.write_text("\n".join([*head, "reach:", "  ssh:", *rows]))
        return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if not os.access(SSHD, os.X_OK) or shutil.which("ssh") is None:
        pytest.skip("there is no sshd or no ssh here")
    folder = tmp_path / "with space"
    (folder / "board").mkdir(parents=True)
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(
        f'Port {port}\nListenAddress 127.0.0.1\nHostKey "{folder}/host"\nAuthorizedKeysFile "{folder}/user.pub"\n'
        f'PidFile "{folder}/pid"\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n'
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    command = [SSHD, "-D", "-e", "-f", str(folder / "config")]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        if not wait_for(lambda: process.poll() is not None or _answers(port)) or process.poll() is not None:
            process.kill()
            pytest.skip(f"sshd does not start: {(folder / 'log').read_text()}")
        try:
            yield Server(folder=folder, port=port, process=process)
        finally:
            process.terminate()


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_boards", {})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [batch_size, 64] times a matrix."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch_size", 64])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch_size", 64])],
        [numpy_helper.from_array(np.ones((64, 64), np.float32), "w")],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _descendants(pid: int) -> dict[int, str]:
    """Every process under `pid`, with its name."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, rest = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            except OSError:
                continue
            parents[int(entry.name)] = (int(rest.split()[1]), name)
    found = {pid: ""}
    while more := {child: name for child, (of, name) in parents.items() if of in found and child not in found}:
        found |= more
    return {child: name for child, name in found.items() if child != pid}


def _measuring(server: Server) -> bool:
    """Whether the worker has started on the board (its request is there before it starts)."""
    return any(server.board.glob("*/said.txt"))


@pytest.mark.device
def test_a_model_is_profiled_from_end_to_end(server: Server, model: Path) -> None:
    result = profile(
        model, str(server.target()), per_operator=True, settings=Settings(**{**vars(QUICK), "memory": True})
    )
    assert result.measurement.kind == "measured"
    assert result.measurement.n == len(result.samples[0].ms) >= 120
    assert (result.samples[0].ms > 0).all()
    assert result.samples[0].peak_rss_mb
    assert len(result.samples[0].cpus) == 1
    assert result.samples[0].facts["runtime"].startswith("onnxruntime ")
    assert {row.type for row in result.operators} >= {"MatMul"}
    assert list(server.board.iterdir()) == []


@pytest.mark.device
def test_every_cpu_of_the_board_is_used_unless_the_target_says_otherwise(server: Server, model: Path) -> None:
    target = load_target(str(server.target()))
    everything = len(os.sched_getaffinity(0))
    (samples,) = measure(
        [Subject(name="m", path=model)], target=Target(**{**vars(target), "threads": None}), settings=QUICK
    )
    assert samples.threads == len(samples.cpus) == everything
    (cpu, *_) = os.sched_getaffinity(0)
    (samples,) = measure([Subject(name="m", path=model)], target=target, cpus=[cpu], settings=QUICK)
    assert samples.cpus == (cpu,)
    with pytest.raises(TargetError, match=r"127\.0\.0\.1.*: CPUs \[4095\] are not among those that may be used"):
        measure([Subject(name="m", path=model)], target=target, cpus=[4095], settings=QUICK)
    with pytest.raises(TargetError, match=f"{everything + 1} threads asked, but only {everything} CPUs are there"):
        measure([Subject(name="m", path=model)], target=target, threads=everything + 1, settings=QUICK)


@pytest.mark.device
def test_a_model_that_does_not_load_there_is_named_as_it_is_here(server: Server, model: Path) -> None:
    broken = onnx.load(str(model))
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, str(model))
    with pytest.raises(ModelError, match=rf"127\.0\.0\.1.*: ONNX Runtime cannot load {model}: .*NoSuchOperator"):
        measure([Subject(name="m", path=model)], target=load_target(str(server.target())), settings=QUICK)
    assert list(server.board.iterdir()) == []


@pytest.mark.device
@pytest.mark.parametrize(
    ("reach", "reason"),
    [
        (
            {"known_hosts": "/dev/null"},
            r"host key of .* is not known: connect once with `ssh -l \w+ -p \d+ 127\.0\.0\.1`",
        ),
        ({"identity": "STRANGER"}, "refuses the key .*Permission denied.*set `user` and `identity`"),
        ({"python": "no-such-python"}, "has no such Python .*set `python`"),
        ({"python": "BARE"}, "cannot load onnxruntime: ModuleNotFoundError: No module named 'numpy'"),
        ({"port": 1}, "cannot reach .* port 1: .*Connection refused"),
    ],
)
def test_a_board_that_cannot_be_used_says_why(
    server: Server, model: Path, tmp_path: Path, reach: dict[str, Any], reason: str
) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    stand_in = {"STRANGER": server.folder / "stranger", "BARE": bare}
    target = server.target(**{key: stand_in.get(value, value) for key, value in reach.items()})
    result = profile(model, str(target), settings=QUICK)
    assert result.measurement.kind == "unavailable"
    assert result.measurement.p50_ms is None
    assert re.search(reason, result.measurement.reason), result.measurement.reason
    assert list(server.board.iterdir()) == []


@pytest.mark.device
def test_another_host_key_than_the_known_one_is_refused(server: Server) -> None:
    key = (server.folder / "stranger.pub").read_text()
    (server.folder / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {key}")
    assert "is not the one known for it" in str(ssh.unavailable(load_target(str(server.target()))))


@pytest.mark.device
def test_a_connection_that_is_cut_says_so_and_leaves_neither_files_nor_processes(server: Server, model: Path) -> None:
    target = load_target(str(server.target()))
    left: list[int] = []

    def cut() -> None:
        assert wait_for(lambda: _measuring(server))
        under = _descendants(server.process.pid)
        left.extend(pid for pid, name in under.items() if not name.startswith("sshd"))
        for pid in (pid for pid, name in under.items() if name.startswith("sshd")):
            os.kill(pid, signal.SIGKILL)

    (thread := threading.Thread(target=cut)).start()
    with pytest.raises(
        TargetError, match=r"the connection to .*127\.0\.0\.1.* was lost while measuring m .*Nothing stays"
    ):
        measure([Subject(name="m", path=model)], target=target, settings=LONG)
    thread.join()
    assert len(left) >= 2
    assert wait_for(lambda: not list(server.board.iterdir()))
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))


@pytest.mark.device
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_edgekd_leaves_nothing_on_the_board(server: Server, model: Path, number: signal.Signals) -> None:
    target = server.target()
    command = [sys.executable, "-m", "edgekd", "profile", str(model), "--target", str(target), "-q"]
    # What a killed process leaves on this side goes with the test's folder.
    environment = {**os.environ, "TMPDIR": str(server.folder)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as asking:
        assert wait_for(lambda: _measuring(server), 60)
        left = [pid for pid, name in _descendants(server.process.pid).items() if not name.startswith("sshd")]
        asking.send_signal(number)
        assert asking.wait(20) != 0
    assert left
    assert wait_for(lambda: not list(server.board.iterdir()))
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))


@pytest.mark.device
def test_a_measurement_that_takes_too_long_is_stopped(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target(str(server.target()))
    run = remote.run
    monkeypatch.setattr(remote, "run", lambda *args, timeout, **more: run(*args, timeout=2.0, **more))
    with pytest.raises(TargetError, match=r"measuring m on .* took longer than 2 s and was stopped"):
        measure([Subject(name="m", path=model)], target=target, settings=LONG)
    assert list(server.board.iterdir()) == []


def reached(**settings: Any) -> Target:
    reach = {"ssh": {"host": "board.local", **settings}}
    return Target(name="b", title="b", runtime="onnxruntime", device="cpu", precisions=("fp32",), reach=reach)


def test_the_command_asks_for_known_hosts_and_no_passwords() -> None:
    command = ssh.link(reached(user="pi", port=2222)).command
    assert command[0] == "ssh"
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=10", "ServerAliveInterval=5"} <= set(command)
    assert command[-6:] == ("-l", "pi", "-p", "2222", "--", "board.local")
    assert not any("IdentityFile" in word or "KnownHosts" in word for word in command)


def test_paths_are_quoted_as_ssh_reads_them(tmp_path: Path) -> None:
    link = ssh.link(reached(identity=str(tmp_path / "my key%h"), known_hosts="~/hosts"))
    assert f'IdentityFile="{tmp_path}/my key%%h"' in link.command
    assert "IdentitiesOnly=yes" in link.command
    assert f'UserKnownHostsFile="{Path.home()}/hosts"' in link.command
    with pytest.raises(TargetError, match="has characters that ssh would read otherwise"):
        ssh.link(reached(identity='/a"b'))


@pytest.mark.parametrize("host", ["-oProxyCommand=reboot", "a b", "pi@board", "ssh://board", "board;reboot", ""])
def test_a_host_that_ssh_would_take_for_something_else_is_refused(host: str) -> None:
    with pytest.raises(TargetError, match="is no host name"):
        ssh.unavailable(reached(host=host))


def test_a_user_that_ssh_would_take_for_something_else_is_refused() -> None:
    with pytest.raises(TargetError, match="is no user name"):
        ssh.link(reached(user="-x"))


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (255, "No ED25519 host key is known for b and you have requested strict checking.\nHost key verification …",
         "is not known: connect once with `ssh -p 22 b`"),
        (255, "@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
         "is not the one known for it"),
        (255, "banner\nroot@b: Permission denied (publickey).", r"refuses the key \(root@b: Permission denied"),
        (255, "ssh: Could not resolve hostname b: Name or service not known", "cannot reach b: ssh: Could not resolve"),
        (255, "", "cannot reach b: ssh said nothing"),
        (127, "sh: 1: exec: python3: not found", r"has no such Python \(sh: 1"),
    ],
)  # fmt: skip
def test_what_ssh_says_is_explained(code: int, said: str, reason: str) -> None:
    assert re.search(reason, str(ssh.explain(code, said, shown="b", place=["-p", "22", "--", "b"])))


def test_a_python_that_fails_is_not_taken_for_a_missing_connection() -> None:
    assert ssh.explain(1, "Traceback …", shown="b", place=[]) is None


def test_without_a_client_the_board_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no ssh client here" in str(ssh.unavailable(reached()))
