"""Android boards reached with `adb shell`; Python and the runtime must be there (for instance from Termux)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.devices import remote
from edgekd.devices.remote import Link
from edgekd.errors import TargetError
from edgekd.target import Target

# Android has no /tmp, and only this folder is open to `adb shell` everywhere.
FOLDER = "/data/local/tmp"

prepare = remote.prepare
placement = remote.placement


def unavailable(target: Target) -> str | None:
    """Why the board cannot be measured from here, or None if it can."""
    connection = link(target)
    if shutil.which("adb") is None:
        return "there is no adb here: install Android's platform tools"
    return remote.unavailable(connection, target)


def run(target: Target, worker: Path, request: Mapping[str, Any], *, folder: Path, timeout: float) -> dict[str, Any]:
    """Do a request on the board; see `edgekd.devices.remote.run`."""
    return remote.run(link(target), worker, request, folder=folder, timeout=timeout)


def link(target: Target) -> Link:
    """The connection a target's `reach` describes.

    Raises:
        TargetError: its serial number is none.
    """
    reach = target.reach_settings
    serial = str(reach.get("serial", ""))
    if serial and not re.fullmatch(r"[A-Za-z0-9_\[][A-Za-z0-9_.:\[\]%-]*", serial):
        raise TargetError(f"target {target.name!r}: {serial!r} is no serial number (`adb devices` lists them)")
    return Link(
        shown=f"the Android device{f' {serial}' if serial else ''}",
        # Without a terminal, adb passes bytes through as they are.
        command=("adb", *(("-s", serial) if serial else ()), "shell", "-T"),
        explain=explain,
        python=reach.get("python", "python3"),
        folder=reach.get("folder", FOLDER),
    )


def explain(code: int, said: str) -> str | None:
    """Why adb made no connection or found no Python, from its exit code and stderr; None if it was something else."""
    last = remote.last_line(said)
    if "unauthorized" in said:
        return f"the device does not trust this computer: confirm the question on its screen ({last})"
    if re.search(r"device .*not found|no devices|offline|more than one device", said):
        return f"adb does not reach the device: {last} (`adb devices` lists them)"
    if code in (126, 127):
        return f"the device has no such Python ({last}): set `python` in the target's `reach`"
    return None
