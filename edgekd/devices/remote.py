"""Measuring on a board that a command line reaches: what the ssh and adb devices share.

One connection does everything: `runner.py` is sent as text, takes the worker, the models and their inputs from its
stdin, sends the results to its stdout, and removes its folder when it is done or when its stdin ends or falls silent.
So nothing depends on a second connection, and a board that lost its connection cleans up by itself.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import shlex
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from edgekd import host
from edgekd.devices import openvino, ort, process
from edgekd.devices.model_files import files_of
from edgekd.errors import TargetError
from edgekd.target import Target

RUNNER = Path(__file__).with_name("runner.py")
MARK = b"edgekd-runner "
BACK = ("result.json", "samples.npz", "trace*.json")
# The board gives up after this silence; we say something six times as often.
PATIENCE_SECONDS = 30.0
BEAT_SECONDS = PATIENCE_SECONDS / 6
FAREWELL_SECONDS = 5.0
PROBE_SECONDS = 90.0
SLOWEST_BYTES_PER_SECOND = 200_000
LARGEST_FILE = 1 << 30
# The runner comes as the first line of stdin: unbuffered, so that not a byte of what follows is lost.
BOOTSTRAP = (
    "import sys;sys.version_info<(3,8)and sys.exit('edgekd needs Python 3.8 there, found '+sys.version.split()[0]);"
    "sys.path=[p for p in sys.path if p];import base64,zlib;"
    "exec(zlib.decompress(base64.b64decode(open(0,'rb',0,closefd=False).readline())))"
)

_boards: dict[str, dict[str, Any]] = {}


class Runtime(Protocol):
    """What runs models on the board: a device of this machine, whose settings and traces are the same there."""

    def lacking(self, target: Target, available: Sequence[str], *, where: str) -> str | None:
        """Why the target cannot be run with what is `available`, or None."""

    def prepare(self, target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """The session settings of one model as plain data."""

    def placement(self, trace: Path, *, warm_runs: int) -> Sequence[ort.Operator]:
        """Where operators ran."""


RUNTIMES: dict[str, Runtime] = {"onnxruntime": ort, "openvino": openvino}


@dataclass(frozen=True, kw_only=True)
class Link:
    """How to reach a board. `command` runs what is appended to it (one word, for the board's shell) over there.

    `explain` turns the command's exit code and stderr into a reason why there is no connection, or None if there was
    one. `folder` is where the board makes its own temporary folder, empty for its usual place.
    """

    shown: str
    command: tuple[str, ...]
    explain: Callable[[int, str], str | None]
    python: str = "python3"
    folder: str = ""


def unavailable(link: Link, target: Target) -> str | None:
    """Why the target cannot be measured over this link, or None; asks the board once per process."""
    runtime = RUNTIMES.get(target.runtime)
    if runtime is None:
        return f"{target.runtime} does not run models on a board (of those that do: {', '.join(RUNTIMES)})"
    key = _key(target)
    try:
        told = _boards.get(key) or talk(link, {"job": "describe", "package": target.runtime}, timeout=PROBE_SECONDS)[0]
    except TargetError as error:
        return str(error)
    if reason := _mismatch(link, target, told):
        return reason
    if told["package"] is None:
        return (
            f"{link.python} (Python {told['python']}) on {link.shown} cannot load {target.runtime}: {told['trouble']}. "
            f"Install it there, or name another `python` in the target's `reach`"
        )
    _boards[key] = told
    return runtime.lacking(target, told["has"], where=f"on {link.shown}")


def usable_cpus(target: Target) -> int:
    """CPUs that a process on the board may use; `unavailable` must have found nothing against it."""
    return int(_boards[_key(target)]["cpus"])


def prepare(target: Target, *, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The session settings for the target's runtime."""
    return RUNTIMES[target.runtime].prepare(target, threads=threads, options=options)


def placement(trace: Path, *, warm_runs: int) -> Sequence[ort.Operator]:
    """Where operators ran, from whichever runtime's trace it is: ONNX Runtime's is a list of events."""
    runtime = RUNTIMES["onnxruntime" if trace.read_bytes()[:1] == b"[" else "openvino"]
    return runtime.placement(trace, warm_runs=warm_runs)


def run(link: Link, worker: Path, request: Mapping[str, Any], *, folder: Path, timeout: float) -> dict[str, Any]:
    """Do a request on the board; the samples or the trace it brings back are put into `folder`.

    Raises:
        ModelError: a model does not load or run there.
        TargetError: the connection is lost, it takes too long, or the board is not up to it.
        StageError: the worker itself failed.
    """
    names = process.names_of(request)
    theirs, files = _pack(worker, request)
    order = {
        "job": "run",
        "folder": link.folder,
        "request": theirs,
        "files": [[name, path.stat().st_size] for name, path in files],
        "back": BACK,
        "inherit": process.INHERITED,
        "environment": process.fixed_environment(process.threads_of(request)),
        "patience": PATIENCE_SECONDS,
    }
    told, brought = talk(link, order, [path for _, path in files], timeout=timeout, doing=f"measuring {names}")
    if "trouble" in told:
        raise TargetError(f"{link.shown}: {told['trouble']}")
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    for name, content in brought.items():
        (folder / name).write_bytes(content)
    if result.is_file():
        text = result.read_text(encoding="utf-8")
        for mine, their in zip(request["subjects"], theirs["subjects"], strict=True):
            text = text.replace(their["path"], json.dumps(mine["path"])[1:-1])
        result.write_text(text, encoding="utf-8")
    return process.answer(request, result, code=told["code"], said=told["said"], where=f"{link.shown}: ")


def talk(
    link: Link, order: Mapping[str, Any], files: Sequence[Path] = (), *, timeout: float, doing: str = "asking it"
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Send the runner, an order and files; what it tells and the files it sends back. `timeout` is in seconds.

    Raises:
        TargetError: there is no connection, it is lost, or it takes longer (a slow upload is allowed for).
    """
    timeout += sum(path.stat().st_size for path in files) / SLOWEST_BYTES_PER_SECOND
    head = base64.b64encode(zlib.compress(RUNNER.read_bytes(), 9)) + b"\n" + json.dumps(order).encode() + b"\n"
    command = [*link.command, remote_command(link.python)]
    done, late = threading.Event(), threading.Event()

    def give_up() -> None:
        late.set()
        _part(there, done)

    with (
        tempfile.TemporaryFile() as said,
        # A session of its own: Ctrl-C must not cut the connection before the board has been told.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        ) as there,
    ):
        feeder = threading.Thread(target=_feed, args=(there.stdin, head, files, done), daemon=True)
        timer = threading.Timer(timeout, give_up)
        feeder.start()
        timer.start()
        try:
            established, found = _read(there.stdout) if there.stdout else (False, None)
        finally:
            timer.cancel()
            _part(there, done)
            feeder.join(FAREWELL_SECONDS)
        said.seek(0)
        words = said.read().decode("utf-8", "replace")
        code = there.returncode
    if found is not None:
        return found
    if late.is_set():
        raise TargetError(f"{doing} on {link.shown} took longer than {timeout:.0f} s and was stopped")
    if established:
        raise TargetError(_lost(link, words, doing))
    failed = f"{link.python} on {link.shown} failed with exit code {code}: {last_line(words) or 'it said nothing'}"
    raise TargetError(link.explain(code, words) or failed)


def remote_command(python: str) -> str:
    """What the board's shell is to run; a leading `~/` is left to that shell."""
    home, rest = ("~/", python[2:]) if python.startswith("~/") else ("", python)
    return f"exec {home}{shlex.quote(rest)} -c {shlex.quote(BOOTSTRAP)}"


def last_line(words: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _lost(link: Link, words: str, doing: str) -> str:
    if "Traceback" in words:
        return f"what looks after the measurement on {link.shown} failed while {doing}: {last_line(words)}"
    why = f" ({last_line(words)})" if last_line(words) else ""
    return (
        f"the connection to {link.shown} was lost while {doing}{why}. Nothing stays there: the board stops and removes "
        f"its files when it notices, at the latest after {PATIENCE_SECONDS:.0f} s"
    )


def _feed(stdin: IO[bytes], head: bytes, files: Sequence[Path], done: threading.Event) -> None:
    """Send everything, then a byte now and then until `done`; the end of stdin tells the board to stop."""
    try:
        stdin.write(head)
        for path in files:
            with path.open("rb") as file:
                while (chunk := file.read(1 << 20)) and not done.is_set():
                    stdin.write(chunk)
        while True:
            stdin.flush()
            if done.wait(BEAT_SECONDS):
                break
            stdin.write(b".")
    except (OSError, ValueError):
        return  # the connection is gone: the other direction tells why
    finally:
        _close(stdin)


def _part(there: subprocess.Popen[bytes], done: threading.Event) -> None:
    """End the connection: the board is told and given a moment to clean up."""
    done.set()
    try:
        there.wait(FAREWELL_SECONDS)
    except subprocess.TimeoutExpired:
        there.kill()
        there.wait()


def _close(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except OSError:
        return


def _read(out: IO[bytes]) -> tuple[bool, tuple[dict[str, Any], dict[str, bytes]] | None]:
    """Whether the runner started, and its answer with its files; None in its place when the stream ends early.

    Lines without the mark are what a login shell prints.
    """
    established, told = False, {}
    for line in out:
        if line.startswith(MARK):
            established, told = True, _told(line[len(MARK) :])
            if told:
                break
    if not told:
        return established, None
    brought = {}
    for name, size in told["files"]:
        known = any(fnmatch.fnmatchcase(name, pattern) for pattern in BACK) and "/" not in name
        if not known or name in brought or not 0 <= size <= LARGEST_FILE:
            raise TargetError(f"the board sends {name!r} of {size} bytes, which was not asked for")
        brought[name] = out.read(size)
        if len(brought[name]) != size:
            return True, None
    return True, (told, brought)


def _told(text: bytes) -> dict[str, Any]:
    """What the runner says, held against the form it has to have: it comes from another machine."""
    try:
        told = json.loads(text)
        files = told.get("files", []) if isinstance(told, dict) else None
        if files is None or not all(
            isinstance(name, str) and isinstance(size, int) and not isinstance(size, bool) for name, size in files
        ):
            raise ValueError
    except (ValueError, TypeError):
        raise TargetError(f"the board answers what edgekd does not understand: {text[:80]!r}") from None
    return {**told, "files": files} if told else {}


def _pack(worker: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
    """The request with paths as they are on the board, and the files it needs there: name over there, path here."""
    files = [(path.name, path) for path in sorted(worker.parent.glob("worker*.py"))]
    subjects = []
    for index, subject in enumerate(request["subjects"]):
        folder, feeds = f"model_{index}", f"feeds_{index}.npz"
        files += [(f"{folder}/{name}", path) for name, path in files_of(Path(subject["path"]))]
        files.append((feeds, Path(subject["feeds"])))
        subjects.append({**subject, "path": f"{folder}/{Path(subject['path']).name}", "feeds": feeds})
    places = {"samples": "samples.npz", "result": "result.json", **({"trace": "trace"} if "trace" in request else {})}
    return {**request, "subjects": subjects, **places}, files


def _mismatch(link: Link, target: Target, told: Mapping[str, Any]) -> str | None:
    """Why the board is not what the target describes."""
    if target.board and target.board not in told["board"]:
        return f"{link.shown} is {told['board'] or 'a board that does not say what it is'}, not {target.board}"
    features = host.features_in(told["cpuinfo"])
    if missing := [name for name in target.requires if name not in features]:
        return f"the CPU of {link.shown} has no {', '.join(missing)}"
    if foreign := [name for name in target.excludes if name in features]:
        return f"the CPU of {link.shown} has {', '.join(foreign)} and would be faster"
    if target.threads is not None and target.threads > told["cpus"]:
        return f"{link.shown} has {told['cpus']} CPUs for a process, the target asks for {target.threads} threads"
    return None


def _key(target: Target) -> str:
    return json.dumps([target.reach, target.runtime], sort_keys=True)
