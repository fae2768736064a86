"""The part that ssh and adb share, over a link that is only the local shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd import host
from edgekd.devices import process, remote
from edgekd.devices.model_files import files_of
from edgekd.devices.remote import Link
from edgekd.errors import ModelError, StageError, TargetError
from edgekd.target import Target

SESSION = {"engine": "onnxruntime", "threads": 1}


@pytest.fixture
def board(tmp_path: Path) -> Path:
    folder = tmp_path / "a board"
    folder.mkdir()
    return folder


@pytest.fixture
def link(board: Path) -> Link:
    return Link(
        shown="the board",
        command=("sh", "-c"),
        explain=lambda code, said: None,
        python=sys.executable,
        folder=str(board),
    )


@pytest.fixture
def target() -> Target:
    return Target(name="b", title="b", runtime="onnxruntime", device="cpu", precisions=("fp32",), reach={"ssh": {}})


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_boards", {})


def tiny(path: Path, *, external: str = "") -> Path:
    weights = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    if external:
        onnx.external_data_helper.set_external_data(weights, external)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    np.savez(tmp_path / "feeds.npz", x=np.ones((1, 4), np.float32))
    model = tiny(tmp_path / "models" / "tiny.onnx")
    subject = {"name": "tiny", "path": str(model), "feeds": str(tmp_path / "feeds.npz"), "session": SESSION}
    return {"job": "time", "subjects": [subject], "samples": "here/samples.npz"}


def worker(tmp_path: Path, code: str) -> Path:
    (tmp_path / "code").mkdir()
    path = tmp_path / "code" / "worker.py"
    path.write_text(code)
    return path


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_files_go_there_results_come_back_and_nothing_stays(
    link: Link, board: Path, request_: dict[str, Any], tmp_path: Path
) -> None:
    code = """
import json, os
request = json.load(open("request.json"))
(subject,) = request["subjects"]
told = {"sizes": [os.path.getsize(subject[key]) for key in ("path", "feeds")], "in": os.getcwd(),
        "parent": request["parent"] == os.getppid(), "threads": os.environ["OMP_NUM_THREADS"]}
json.dump(told, open(request["result"], "w"))
open(request["samples"], "wb").write(b"samples")
open("left.bin", "wb").write(b"not asked for")
"""
    (out := tmp_path / "out").mkdir()
    answer = remote.run(link, worker(tmp_path, code), request_, folder=out, timeout=60)
    subject = request_["subjects"][0]
    assert answer["sizes"] == [Path(subject[key]).stat().st_size for key in ("path", "feeds")]
    assert Path(answer["in"]).parent == board
    assert answer["parent"]
    assert answer["threads"] == "1"
    assert sorted(path.name for path in out.iterdir()) == ["result.json", "samples.npz"]
    assert (out / "samples.npz").read_bytes() == b"samples"
    assert list(board.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("raise RuntimeError('broken worker')", StageError, "the board: the measuring process failed with exit code 1"),
        ("import os; os.abort()", ModelError, r"the board: ONNX Runtime crashed \(SIGABRT\) on .*models/tiny\.onnx"),
        ("import os; os.kill(os.getpid(), 9)", ModelError, "SIGKILL: the system kills processes when memory runs out"),
        ("import time; time.sleep(60)", TargetError, "measuring tiny on the board took longer than 1 s"),
    ],
)
def test_a_failing_worker_is_explained_and_leaves_nothing(
    link: Link, board: Path, request_: dict[str, Any], tmp_path: Path, code: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        remote.run(link, worker(tmp_path, code), request_, folder=tmp_path, timeout=1 if "sleep" in code else 60)
    assert list(board.iterdir()) == []


def test_errors_name_the_model_here_and_whose_fault_it_is(link: Link, request_: dict[str, Any], tmp_path: Path) -> None:
    code = """
import json
request = json.load(open("request.json"))
json.dump({"error": "cannot load " + request["subjects"][0]["path"], "of": OF}, open(request["result"], "w"))
"""
    path = request_["subjects"][0]["path"]
    with pytest.raises(ModelError, match=f"the board: cannot load {path}"):
        remote.run(link, worker(tmp_path, "OF = 'model'" + code), request_, folder=tmp_path, timeout=60)
    (tmp_path / "code" / "worker.py").write_text("OF = 'target'" + code)
    with pytest.raises(TargetError, match="the board: cannot load"):
        remote.run(link, tmp_path / "code" / "worker.py", request_, folder=tmp_path, timeout=60)


def test_a_lost_connection_says_so_and_the_board_cleans_up(
    link: Link, board: Path, request_: dict[str, Any], tmp_path: Path
) -> None:
    # The command in between dies, as ssh does; the runner only sees its stdin end.
    pids, between = tmp_path / "pids", tmp_path / "between"
    between.write_text(f'#!/bin/sh\necho $$ > "{pids}"\ncat | sh -c "$1" | cat\n')
    between.chmod(0o755)
    broken = Link(**{**vars(link), "command": (str(between),)})
    code = f"import time; open({str(tmp_path / 'started')!r}, 'w').close(); time.sleep(60)"
    path = worker(tmp_path, code)

    def cut() -> None:
        assert wait_for(lambda: (tmp_path / "started").exists())
        group = os.getpgid(int(pids.read_text()))
        for name in os.listdir("/proc"):
            if name.isdigit() and _in_group(int(name), group) and _command(int(name)) in ("cat", "between"):
                os.kill(int(name), signal.SIGKILL)

    threading.Thread(target=cut).start()
    with pytest.raises(TargetError, match=r"the connection to the board was lost while measuring tiny.*Nothing stays"):
        remote.run(broken, path, request_, folder=tmp_path, timeout=60)
    assert wait_for(lambda: not list(board.iterdir()))


def _in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.mark.parametrize("way", ["silence", "end", "signal"])
def test_the_runner_stops_when_nobody_waits(board: Path, tmp_path: Path, way: str) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)".encode()
    order = {
        "job": "run", "folder": str(board), "request": {}, "files": [["worker.py", len(code)]], "back": [],
        "inherit": ["PATH"], "environment": {}, "patience": 1.0 if way == "silence" else 60.0,
    }  # fmt: skip
    runner = subprocess.Popen([sys.executable, str(remote.RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with runner:
        assert runner.stdin is not None
        runner.stdin.write(json.dumps(order).encode() + b"\n" + code)
        runner.stdin.flush()
        assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        if way == "signal":
            runner.terminate()
        if way == "end":
            runner.stdin.close()
        assert runner.wait(20) == 1
    assert list(board.iterdir()) == []
    # Killed, and then the system has to collect it.
    assert wait_for(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_upload_that_breaks_off_leaves_nothing(board: Path) -> None:
    order = {"job": "run", "folder": str(board), "files": [["worker.py", 1000]], "patience": 30.0}
    done = subprocess.run(
        [sys.executable, str(remote.RUNNER)],
        input=json.dumps(order).encode() + b"\nhalf",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert list(board.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(link: Link, request_: dict[str, Any], tmp_path: Path) -> None:
    lost = Link(**{**vars(link), "folder": "/no/such/folder"})
    with pytest.raises(TargetError, match=r"the board: cannot write there: .*'/no/such/folder"):
        remote.run(lost, worker(tmp_path, ""), request_, folder=tmp_path, timeout=60)


def test_what_the_login_shell_prints_is_passed_over(link: Link, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    chatty.write_text('#!/bin/sh\nprintf "Welcome!\\nno end of line"\nexec sh -c "$1"\n')
    chatty.chmod(0o755)
    order = {"job": "describe", "package": "onnxruntime"}
    told, _ = remote.talk(Link(**{**vars(link), "command": (str(chatty),)}), order, timeout=60)
    assert "CPUExecutionProvider" in told["has"]


def test_files_that_were_not_asked_for_are_refused(tmp_path: Path) -> None:
    import io

    for name in ("../evil", "trace/../../evil.json", "worker.py"):
        line = remote.MARK + json.dumps({"files": [[name, 1]]}).encode() + b"\nx"
        with pytest.raises(TargetError, match="was not asked for"):
            remote._read(io.BytesIO(line))


def test_the_board_is_asked_once_and_checked_against_the_target(link: Link, target: Target) -> None:
    def asked(**changes: Any) -> str | None:
        return remote.unavailable(link, Target(**{**vars(target), **changes}))

    assert asked() is None
    assert remote.usable_cpus(target) == len(host.logical_cpus())
    assert "ONNX Runtime has no NoSuchExecutionProvider on the board (it has " in str(
        asked(providers=("NoSuchExecutionProvider",))
    )
    assert asked(threads=4096) == (
        f"the board has {len(host.logical_cpus())} CPUs for a process, the target asks for 4096 threads"
    )
    absent = next(iter(set(host.FEATURES.values()) - host.cpu_features()))
    assert asked(requires=(absent,)) == f"the CPU of the board has no {absent}"
    for present in sorted(host.cpu_features())[:1]:
        assert asked(excludes=(present,)) == f"the CPU of the board has {present} and would be faster"
    assert "not Raspberry Pi 99" in str(asked(board="Raspberry Pi 99"))
    assert "qualcomm does not run models on a board" in str(asked(runtime="qualcomm"))
    gone = Link(**{**vars(link), "command": ("false",)})
    assert remote.unavailable(gone, target) is None
    remote._boards.clear()
    assert "failed with exit code 1" in str(remote.unavailable(gone, target))


def test_a_python_without_the_runtime_is_named(link: Link, target: Target, tmp_path: Path) -> None:
    bare = tmp_path / "bare python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    reason = str(remote.unavailable(Link(**{**vars(link), "python": str(bare)}), target))
    assert "on the board cannot load onnxruntime: ModuleNotFoundError: No module named 'numpy'" in reason
    assert "name another `python`" in reason


def test_the_command_is_quoted_for_the_boards_shell() -> None:
    assert remote.remote_command("python3").startswith("exec python3 -c 'import sys;")
    assert remote.remote_command("~/my env/bin/python").startswith("exec ~/'my env/bin/python' -c ")
    assert remote.remote_command("$(reboot); x").startswith("exec '$(reboot); x' -c ")
    assert "\n" not in remote.remote_command("python3")


def test_weights_beside_the_model_go_with_it(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model.onnx", external="data/weights.bin")
    with pytest.raises(ModelError, match=r"keeps weights in data/weights\.bin, which is missing"):
        files_of(model)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights.bin").touch()
    assert [name for name, _ in files_of(model)] == ["data/weights.bin", "model.onnx"]
    with pytest.raises(ModelError, match="outside its folder"):
        files_of(tiny(tmp_path / "other.onnx", external="../weights.bin"))


def test_traces_of_either_runtime_are_told_apart(tmp_path: Path) -> None:
    (trace := tmp_path / "trace.json").write_text(
        json.dumps({"engine": "openvino", "device": "CPU", "nodes": [{"type": "MVN", "us": 3.0}] * 2})
    )
    (row,) = remote.placement(trace, warm_runs=1)
    assert (row.type, row.provider, row.calls, row.share) == ("MVN", "CPU", 2, 1.0)
    assert row.ms == pytest.approx(0.006)
    trace.write_text("[]")
    with pytest.raises(StageError, match="the trace holds 0 runs"):
        remote.placement(trace, warm_runs=0)


def test_the_board_inherits_no_more_than_a_local_process() -> None:
    assert set(process.environment(1)) <= {*process.INHERITED, *process.fixed_environment(1)}
