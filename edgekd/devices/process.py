"""The measuring process on this machine, and what is made of its answer, wherever it ran."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import ModelError, StageError, TargetError
from edgekd.target import Target

# All that the measuring process inherits; anything else (OMP_*, MALLOC_*, LD_PRELOAD …) could change its speed.
INHERITED = (
    "PATH", "HOME", "LANG", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH",
)  # fmt: skip
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
REFUSED = 3
"""Exit code of a worker that says why it cannot do what is asked."""
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def run(target: Target, worker: Path, request: Mapping[str, Any], *, folder: Path, timeout: float) -> dict[str, Any]:
    """Run the worker in a process of its own, with an environment of its own.

    Raises:
        ModelError: a model does not load or run, or brings the process down.
        TargetError: it takes longer than `timeout` seconds, or more is asked than this machine has.
        StageError: the worker itself failed.
    """
    asked, result = folder / "request.json", folder / "result.json"
    result.unlink(missing_ok=True)
    asked.write_text(json.dumps({**request, "result": str(result), "parent": os.getpid()}), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, str(worker), str(asked)], env=environment(threads_of(request)), cwd=folder,
            capture_output=True, timeout=timeout, check=False, text=True, errors="replace", stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TargetError(f"measuring {names_of(request)} took longer than {timeout:.0f} s and was stopped") from None
    return answer(request, result, code=done.returncode, said=done.stderr)


def answer(request: Mapping[str, Any], result: Path, *, code: int, said: str, where: str = "") -> dict[str, Any]:
    """The worker's answer, or what its exit code and last words mean; `where` goes before messages.

    Raises:
        ModelError, TargetError, StageError: as `run`.
    """
    if code < 0:
        engine = ENGINES[request["subjects"][0]["session"].get("engine", "onnxruntime")]
        hint = ": the system kills processes when memory runs out" if -code == signal.SIGKILL else ""
        crash = f"{where}{engine} crashed ({_signal_name(-code)}{hint}) on {_paths(request)}"
        raise ModelError(crash + _tail(said))
    if not result.is_file() or code not in (0, REFUSED):
        raise StageError(f"{where}the measuring process failed with exit code {code}{_tail(said)}")
    told: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in told:
        kind = TargetError if told.get("of") == "target" else ModelError
        raise kind(where + told["error"])
    return told


def environment(threads: int) -> dict[str, str]:
    """The environment of the measuring process."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**kept, **fixed_environment(threads)}


def fixed_environment(threads: int) -> dict[str, str]:
    """What is set in the environment of the measuring process on every machine."""
    fixed = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    return {**fixed, **{name: str(threads) for name in THREAD_VARIABLES}}


def threads_of(request: Mapping[str, Any]) -> int:
    """Threads of one inference."""
    return int(request["subjects"][0]["session"]["threads"])


def names_of(request: Mapping[str, Any]) -> str:
    """The models of a request, for messages."""
    return ", ".join(subject["name"] for subject in request["subjects"])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _paths(request: Mapping[str, Any]) -> str:
    return ", ".join(subject["path"] for subject in request["subjects"])


def _tail(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()][-8:]
    return "\n  " + "\n  ".join(lines) if lines else " and said nothing"
