"""Run folders: one folder per stage, found again by the key of all that went into it; one process at a time.

RUN/.edgekd-run          marks the folder as a run; the lock is taken on it
RUN/.cache/              what several stages share: the teacher's outputs, latency tables of search
RUN/.work/               scratch of unfinished stages, kept across a kill
RUN/01-search/           a finished stage: its outputs and stage.json, which names them, their hashes and the key
RUN/manifest.json        written last: a run that has it is finished
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from edgekd.errors import StoreError
from edgekd.files import (
    explained,
    list_files,
    publish,
    sha256_file,
    sha256_folder,
    sha256_json,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "RunFolder",
    "StageFolder",
    "publish",
    "sha256_file",
    "sha256_folder",
    "sha256_json",
    "write_bytes",
    "write_json",
    "write_text",
]

MANIFEST = "manifest.json"
STAGE = "stage.json"
MARK = ".edgekd-run"
CACHE = ".cache"
_WORK = ".work"
_STAGE_NAME = re.compile(r"\d{2,}-[a-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class StageFolder:
    """One stage of a run: where its outputs are or will be, and whether they are there for this key.

    `entry` is the ledger entry given to `commit`; `notice` says why an existing folder does not count.
    """

    path: Path
    key: str
    complete: bool
    entry: Mapping[str, Any] | None = None
    notice: str | None = None

    @property
    def work(self) -> Path:
        """The scratch folder of this stage and key."""
        return self.path.parent / _WORK / f"{self.path.name}-{self.key[:16]}"


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: str | Path) -> None:
        """Create the folder, or take up the run in it.

        Raises:
            StoreError: it cannot be written, or it holds something that is not a run of edgekd.
        """
        self.path = Path(path)
        mark = self.path / MARK
        self._new = not self.path.exists()
        if (self.path.exists() or self.path.is_symlink()) and not self.path.is_dir():
            raise StoreError(f"cannot use {self.path} as a run folder: it is a file; choose another --out")
        with explained("write the run folder", self.path):
            if self.path.is_dir() and not mark.is_file() and any(self.path.iterdir()):
                raise StoreError(
                    f"will not write into {self.path}: it is not empty and not a run of edgekd; choose another --out"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            with mark.open("a"):
                pass
            probe = self.path / f".probe.{os.getpid()}.tmp"
            probe.write_bytes(b"edgekd")
            probe.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the run for the length of a `with` block; a killed process lets go.

        Raises:
            StoreError: another process holds the lock.
        """
        mark = self.path / MARK
        with explained("lock", mark):
            file = mark.open("r+")
        with file:
            _take(file, self.path)
            try:
                self._sweep()
                yield
            finally:
                file.truncate(0)

    def stage(self, index: int, name: str, key: str) -> StageFolder:
        """Look up the stage that runs as number `index` with this key, verifying the hashes of its outputs."""
        path = self.path / f"{index:02d}-{name}"
        if not _STAGE_NAME.fullmatch(path.name):
            raise ValueError(f"not a stage name: {path.name!r}")
        if not path.exists():
            return StageFolder(path=path, key=key, complete=False)
        record = _record(path)
        if record is None:
            notice = f"{path.name}: {STAGE} is missing or damaged; the stage runs again"
        elif record["key"] != key:
            notice = f"{path.name}: its settings or inputs have changed; the stage runs again"
        elif changed := _changed(path, record):
            notice = f"{path.name}: {changed} is not as the stage left it; the stage runs again"
        else:
            return StageFolder(path=path, key=key, complete=True, entry=record["entry"])
        return StageFolder(path=path, key=key, complete=False, notice=notice)

    def begin(self, stage: StageFolder) -> Path:
        """Return the scratch folder of an unfinished stage, as a killed run with the same key left it.

        The manifest is taken away, as the run is no longer finished, and so is scratch of the stage's other keys.

        Raises:
            StoreError: it cannot be written, or the stage's older folder holds files edgekd did not write.
        """
        if stage.path.exists():
            _check_ours(stage.path)
        with explained("write", stage.work):
            (self.path / MANIFEST).unlink(missing_ok=True)
            for other in (self.path / _WORK).glob(f"{stage.path.name}-*"):
                if other != stage.work:
                    shutil.rmtree(other)
            stage.work.mkdir(parents=True, exist_ok=True)
        return stage.work

    def draft(self, stage: StageFolder) -> Path:
        """Return an empty folder for the outputs of a stage, to be handed to `commit` when they are all there."""
        draft = stage.work.with_name(f"{stage.work.name}.draft")
        with explained("write", draft):
            if draft.exists():
                shutil.rmtree(draft)
            draft.mkdir(parents=True)
        return draft

    def commit(self, stage: StageFolder, draft: Path, entry: Mapping[str, Any]) -> StageFolder:
        """Make `draft` the stage's outputs, atomically, with its ledger entry; then drop the scratch.

        Raises:
            StoreError: it cannot be written, or an older folder of the stage holds files edgekd did not write.
        """
        outputs = {name: _fingerprint(draft / name) for name in list_files(draft) if name != STAGE}
        write_json(draft / STAGE, {"schema": 1, "key": stage.key, "entry": dict(entry), "outputs": outputs})
        if stage.path.exists():
            _clear(stage.path)
        publish(draft, stage.path, marker=STAGE)
        with explained("clear", stage.work):
            shutil.rmtree(stage.work, ignore_errors=True)
        return StageFolder(path=stage.path, key=stage.key, complete=True, entry=dict(entry))

    def finish(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest, the last file of a run, and drop all scratch."""
        write_json(self.path / MANIFEST, manifest)
        shutil.rmtree(self.path / _WORK, ignore_errors=True)
        return self.path / MANIFEST

    def fresh(self) -> None:
        """Forget earlier runs: stage folders, scratch, the manifest, latencies that were measured, and nothing else.

        Raises:
            StoreError: a stage folder holds files that edgekd did not write; nothing has been removed then.
        """
        stages = [path for path in self.path.iterdir() if path.is_dir() and _STAGE_NAME.fullmatch(path.name)]
        ours = [path for path in sorted(stages) if (path / STAGE).exists()]
        for path in ours:
            _check_ours(path)
        with explained("clear", self.path):
            (self.path / MANIFEST).unlink(missing_ok=True)
            for path in ours:
                _clear(path)
            for table in (self.path / CACHE).glob("latency-*"):
                table.unlink()
            shutil.rmtree(self.path / _WORK, ignore_errors=True)

    def forget_if_new(self) -> None:
        """Take the folder away again if this object made it and nothing has been put into it."""
        if self._new and {path.name for path in self.path.iterdir()} <= {MARK}:
            with explained("remove", self.path):
                (self.path / MARK).unlink()
                self.path.rmdir()

    def _sweep(self) -> None:
        """Drop what a killed process left half-done."""
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for leftover in (self.path / _WORK).glob("removed-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _take(file: TextIO, path: Path) -> None:
    try:
        with explained("lock", path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except StoreError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise
        holder = file.read().strip()
        by = f"process {holder}" if holder.isdigit() else "another process"
        raise StoreError(f"{path} is in use by {by}; wait for it, stop it, or choose another --out") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((path / STAGE).read_text(encoding="utf-8"))
        named = {"key": str, "entry": dict, "outputs": dict}
        whole = all(isinstance(record[name], kind) for name, kind in named.items())
        whole = whole and all({"size", "sha256"} <= output.keys() for output in record["outputs"].values())
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _changed(path: Path, record: Mapping[str, Any]) -> str | None:
    """The first output that is missing or not as recorded; sizes first, since they cost nothing."""
    outputs: dict[str, dict[str, Any]] = record["outputs"]
    for name, recorded in outputs.items():
        if not (path / name).is_file() or (path / name).stat().st_size != recorded["size"]:
            return name
    return next((name for name, recorded in outputs.items() if sha256_file(path / name) != recorded["sha256"]), None)


def _check_ours(path: Path) -> None:
    record = _record(path)
    foreign = sorted({*list_files(path, ())} - {STAGE, *record["outputs"]}) if record else []
    if foreign:
        raise StoreError(f"will not replace {path}: edgekd did not write {', '.join(foreign[:3])}; move it away")


def _clear(path: Path) -> None:
    """Remove an older stage folder; one whose record is damaged is set aside, since it may hold anything."""
    if _record(path) is None:
        aside = next(
            candidate
            for number in range(1, 10_000)
            if not (candidate := path.with_name(f"{path.name}.damaged-{number}")).exists()
        )
        with explained("set aside", path):
            path.rename(aside)
        return
    _check_ours(path)
    with explained("remove", path):
        removed = path.parent / _WORK / f"removed-{secrets.token_hex(4)}"
        removed.parent.mkdir(exist_ok=True)
        path.rename(removed)
        shutil.rmtree(removed)
