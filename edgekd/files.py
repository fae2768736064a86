"""Hash files and folders, and write them so that a kill at any moment leaves the old or the new, never a half."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekd.errors import StoreError

IGNORED = (".git", ".DS_Store", "__pycache__")
"""Names that `sha256_folder` passes over wherever they stand."""

_REASONS = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOENT: "no such file or folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EXDEV: "source and destination are on different file systems",
}


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StoreError` such as `cannot write runs/x: no space left on the device`."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise StoreError(f"cannot {action} {path}: {reason}") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with explained("read", path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of plain data: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value is not plain data.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(value: Any) -> str:
    """SHA-256 of `canonical_json`, in hex."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def list_files(folder: Path, ignore: Collection[str] = IGNORED) -> list[str]:
    """The files under a folder as sorted POSIX names relative to it, without those under an ignored name."""
    names = []
    with explained("read", folder):
        for root, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if name not in ignore]
            names += [(Path(root) / name).relative_to(folder).as_posix() for name in files if name not in ignore]
    return sorted(names)


def sha256_folder(folder: Path, ignore: Collection[str] = IGNORED) -> str:
    """SHA-256 of a folder: its files' relative names and contents, whatever their order, dates and permissions."""
    return sha256_json([[name, sha256_file(folder / name)] for name in list_files(folder, ignore)])


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: a temporary file beside it, `fsync`, `os.replace`.

    Raises:
        StoreError: it cannot be written; an older file at `path` is then untouched.
    """
    with explained("write", path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_bytes` does; NaN and infinity are refused with a `ValueError`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def require_parent(path: Path) -> None:
    """See that something can be put at `path`: its folder is there, or can be made; nothing is made yet.

    Raises:
        StoreError: a part of the path is a file, or a folder that may not be written.
    """
    with explained("write", path):
        parent = path.absolute().parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise StoreError(f"cannot write {path}: {parent} is not a folder; choose another place")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise StoreError(f"cannot write {path}: no permission to write into {parent}; choose another place")


def require_place(final: Path, *, marker: str, why: str) -> None:
    """See before any work that `publish` will be able to put a folder at `final`, an option `--out`.

    Raises:
        StoreError: it is a file, a link, the folder of this process or around it, or holds files and no `marker`
            (`why` says what that means); or it cannot be written.
    """
    require_parent(final)
    with explained("write", final):
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise StoreError(f"cannot write {final}: it is a file or a link, not a folder; choose another --out")
        if final.exists() and any(final.iterdir()) and not (final / marker).is_file():
            raise StoreError(f"will not replace {final}: {why}; choose another --out")
        if final.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise StoreError(f"cannot write {final}: it holds the folder you are in; name a new folder instead")


def publish(draft: Path, final: Path, *, marker: str | None = None) -> None:
    """Move a finished folder to its place by renaming it; both must be on one file system.

    An older folder at `final` is replaced only if it is empty or holds a file named `marker`. A kill leaves the old
    folder, the new one, or none (then the old one lies beside it as `.NAME.old-…` until the next `publish`).

    Raises:
        StoreError: `final` is a file or a folder of somebody else's, or cannot be written.
    """
    with explained("write", final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _sync_folder(draft)
        old = None
        if final.exists() or final.is_symlink():
            _check_replaceable(final, marker)
            old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
            os.rename(final, old)
        try:
            os.rename(draft, final)
        except OSError:
            if old is not None:
                os.rename(old, final)
            raise
        _sync(final.parent)
        for leftover in final.parent.glob(f".{final.name}.old-*"):
            shutil.rmtree(leftover)


def _check_replaceable(final: Path, marker: str | None) -> None:
    if final.is_symlink() or not final.is_dir():
        raise StoreError(f"cannot write {final}: it is a file or a link, not a folder; choose another place")
    if any(final.iterdir()) and not (marker and (final / marker).is_file()):
        raise StoreError(f"will not replace {final}: edgekd did not write it; choose another place or move it away")


def _sync_folder(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise(error: OSError) -> None:
    raise error
