"""What looks after a measurement on a board; sent there as text, needs Python 3.8 and nothing else.

stdin:  a line of JSON (the order), the bytes of the files it names, then a byte every few seconds from whoever waits
stdout: a line `edgekd-runner {}` at once, one `edgekd-runner {json}` (the answer) at the end, and the bytes of the
        files that the answer names

When stdin ends, or says nothing for `patience` seconds, nobody waits any more: the worker is killed. The folder that
everything happened in is removed in any case.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

MARK = b"edgekd-runner "
CHUNK = 1 << 20


class NobodyWaitsError(Exception):
    """Nobody waits for the answer any more."""


def main() -> int:
    """Do what the order says; 0 if an answer was sent."""
    _on_signals(_leave)
    folder = None
    try:
        # Whatever the login shell has printed so far may lack the end of its line.
        os.write(1, b"\n" + MARK + b"{}\n")
        order = json.loads(_line())
        if order["job"] == "describe":
            _send(describe(order["package"]), [])
            return 0
        parent = os.path.expanduser(order["folder"]) if order["folder"] else None
        try:
            folder = Path(tempfile.mkdtemp(prefix="edgekd-", dir=parent))
            _receive(order["files"], folder, order["patience"])
        except OSError as error:
            _send({"trouble": f"cannot write there: {error}"}, [])
            return 1
        _send(*_work(order, folder))
        return 0
    except (NobodyWaitsError, BrokenPipeError):
        return 1
    finally:
        _on_signals(signal.SIG_IGN)
        if folder:
            shutil.rmtree(str(folder), ignore_errors=True)


def describe(package: str) -> dict[str, Any]:
    """What this board is and has."""
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "package": None,
        "has": [],
    }
    told["cpuinfo"] = _text("/proc/cpuinfo")
    names = " ".join(_text(f"/proc/device-tree/{key}") for key in ("model", "compatible"))
    told["board"] = " ".join(names.replace("\0", " ").split())
    told["cpus"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import numpy

        told["numpy"] = numpy.__version__
        module = __import__(package)
        told["package"] = getattr(module, "__version__", "of an unknown version")
        told["has"] = module.get_available_providers() if package == "onnxruntime" else module.Core().available_devices
    except Exception as error:  # noqa: BLE001 - a package can fail to load in many ways, and each is worth telling
        told["trouble"] = f"{type(error).__name__}: {error}"
    return told


def _work(order: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Run the worker until it is done or nobody waits; what to say of it and the files to send."""
    request = dict(order["request"], parent=os.getpid())
    (folder / "request.json").write_text(json.dumps(request))
    kept = {name: os.environ[name] for name in order["inherit"] if name in os.environ}
    with open(str(folder / "said.txt"), "wb") as said:
        worker = subprocess.Popen(
            [sys.executable, "worker.py", "request.json"], cwd=str(folder), env=dict(kept, **order["environment"]),
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    gone = threading.Event()
    threading.Thread(target=_watch, args=(worker, order["patience"], gone), daemon=True).start()
    try:
        code = worker.wait()
    finally:
        _kill(worker)
    if gone.is_set():
        raise NobodyWaitsError
    words = (folder / "said.txt").read_bytes()[-4000:].decode("utf-8", "replace")
    files = [file for pattern in order["back"] for file in sorted(folder.glob(pattern)) if file.is_file()]
    return {"code": code, "said": words}, files


def _watch(worker: Any, patience: float, gone: threading.Event) -> None:
    """Kill the worker when stdin ends or stays silent."""
    while select.select([0], [], [], patience)[0] and os.read(0, 4096):
        pass
    gone.set()
    _kill(worker)


def _kill(worker: Any) -> None:
    """Kill the worker and whatever it started."""
    with contextlib.suppress(OSError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _line() -> bytes:
    """The first line of stdin, and not a byte more."""
    return open(0, "rb", buffering=0, closefd=False).readline() or _gone()


def _receive(files: list[Any], folder: Path, patience: float) -> None:
    """Write the files that follow on stdin: pairs of a path within the folder and a size in bytes."""
    for name, size in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(str(folder / name), "wb") as file:
            while size:
                ready = select.select([0], [], [], patience)[0]
                chunk = (os.read(0, min(CHUNK, size)) if ready else b"") or _gone()
                file.write(chunk)
                size -= len(chunk)


def _send(told: dict[str, Any], files: list[Path]) -> None:
    told = dict(told, files=[[file.name, file.stat().st_size] for file in files])
    with open(1, "wb", closefd=False) as out:
        out.write(MARK + json.dumps(told).encode() + b"\n")
        for file in files:
            out.write(file.read_bytes())


def _gone() -> bytes:
    raise NobodyWaitsError


def _on_signals(action: Any) -> None:
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)


def _leave(number: int, frame: Any) -> None:
    raise NobodyWaitsError


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
