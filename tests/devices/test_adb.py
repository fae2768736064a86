"""An Android device that is this machine, behind a script that stands for `adb`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.devices import adb, remote
from edgekd.errors import TargetError
from edgekd.latency import profile
from edgekd.latency.bench import Settings
from edgekd.target import Target

QUICK = Settings(blocks=12, block_ms=0.1, min_runs=120, max_seconds=5.0, window_ms=1.0, warmup_seconds=0.2)
ADB = """#!/bin/sh
echo "$@" | cut -c 1-40 >> "$ADB_LOG"
if [ "$2" != emulator-5554 ]; then echo "adb: device '$2' not found" >&2; exit 1; fi
shift 4
exec sh -c "$*"
"""


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_boards", {})


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "adb").write_text(ADB)
    (folder / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ADB_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def reached(**settings: str) -> Target:
    reach = {"adb": {"serial": "emulator-5554", "python": sys.executable, **settings}}
    facts = {"runtime": "onnxruntime", "device": "cpu", "precisions": ("fp32",), "threads": 1, "reach": reach}
    return Target(name="phone", title="phone", **facts)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.ones((4, 4), np.float32), "w")],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_a_model_is_profiled_and_nothing_stays(log: Path, model: Path, tmp_path: Path) -> None:
    (board := tmp_path / "board").mkdir()
    result = profile(model, reached(folder=str(board)), settings=QUICK)
    assert result.measurement.kind == "measured"
    assert len(result.samples[0].ms) >= 120
    assert list(board.iterdir()) == []
    assert set(log.read_text().splitlines()) == {"-s emulator-5554 shell -T exec " + sys.executable[:9]}


def test_a_device_that_is_not_there_is_unavailable(log: Path) -> None:
    reason = adb.unavailable(reached(serial="other"))
    assert reason == "adb does not reach the device: adb: device 'other' not found (`adb devices` lists them)"


def test_without_adb_the_device_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "there is no adb here" in str(adb.unavailable(reached()))


def test_a_serial_that_adb_would_take_for_an_option_is_refused() -> None:
    with pytest.raises(TargetError, match="is no serial number"):
        adb.link(reached(serial="-e"))


def test_the_folder_is_the_one_that_is_open_to_everyone() -> None:
    assert adb.link(reached()).folder == "/data/local/tmp"
    assert adb.link(Target(**{**vars(reached()), "reach": {"adb": {}}})).command == ("adb", "shell", "-T")


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (1, "error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", "confirm the question"),
        (1, "error: no devices/emulators found", "does not reach the device: error: no devices"),
        (1, "adb: device offline", "does not reach the device"),
        (127, "/system/bin/sh: python3: inaccessible or not found", "has no such Python"),
    ],
)
def test_what_adb_says_is_explained(code: int, said: str, reason: str) -> None:
    assert re.search(reason, str(adb.explain(code, said)))


def test_a_python_that_fails_is_not_taken_for_a_missing_device() -> None:
    assert adb.explain(1, "Traceback …") is None
