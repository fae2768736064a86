"""Boards reached with the system's OpenSSH client: keys only, known host keys only, dead connections found in seconds.

The user's own `~/.ssh/config` applies (aliases, jump hosts); what security and cleaning up rest on is set over it.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.devices import remote
from edgekd.devices.remote import Link
from edgekd.errors import TargetError
from edgekd.target import Target

FIXED = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "UpdateHostKeys": "no",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ControlMaster": "no",
    "ControlPath": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RequestTTY": "no",
    "LogLevel": "INFO",
}

prepare = remote.prepare
placement = remote.placement


def unavailable(target: Target) -> str | None:
    """Why the board cannot be measured from here, or None if it can."""
    connection = link(target)
    if shutil.which("ssh") is None:
        return "there is no ssh client here: install OpenSSH's"
    return remote.unavailable(connection, target)


def run(target: Target, worker: Path, request: Mapping[str, Any], *, folder: Path, timeout: float) -> dict[str, Any]:
    """Do a request on the board; see `edgekd.devices.remote.run`."""
    return remote.run(link(target), worker, request, folder=folder, timeout=timeout)


def link(target: Target) -> Link:
    """The connection a target's `reach` describes.

    Raises:
        TargetError: a setting in it could be taken for something else by ssh.
    """
    reach = target.reach_settings
    host, user, port = str(reach["host"]), str(reach.get("user", "")), reach.get("port")
    if not re.fullmatch(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*", host):
        raise TargetError(f"target {target.name!r}: host {host!r} is no host name (user and port have their own keys)")
    if user and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@\\-]*", user):
        raise TargetError(f"target {target.name!r}: {user!r} is no user name")
    options = dict(FIXED)
    if "identity" in reach:
        options |= {"IdentityFile": _file(target, "identity"), "IdentitiesOnly": "yes"}
    if "known_hosts" in reach:
        options |= {"UserKnownHostsFile": _file(target, "known_hosts"), "GlobalKnownHostsFile": "/dev/null"}
    settings = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    place = [*(("-l", user) if user else ()), *(("-p", str(port)) if port else ()), "--", host]
    shown = (f"{user}@" if user else "") + host + (f" port {port}" if port else "")
    return Link(
        shown=shown,
        command=("ssh", "-T", *settings, *place),
        explain=lambda code, said: explain(code, said, shown=shown, place=place),
        python=reach.get("python", "python3"),
        folder=reach.get("folder", ""),
    )


def explain(code: int, said: str, *, shown: str, place: list[str]) -> str | None:
    """Why ssh made no connection or found no Python, from its exit code and stderr; None if it was something else."""
    by_hand = shlex.join(["ssh", *(word for word in place if word != "--")])
    if "HOST IDENTIFICATION HAS CHANGED" in said:
        return (
            f"the host key of {shown} is not the one known for it: the board was set up anew, or someone is in "
            f"between. If you are sure, `ssh-keygen -R` its entry and connect once with `{by_hand}`"
        )
    if "Host key verification failed" in said or "host key is known for" in said:
        return (
            f"the host key of {shown} is not known: connect once with `{by_hand}` and compare its fingerprint, or add "
            f"what `ssh-keyscan` prints to `known_hosts` when you have compared it"
        )
    last = remote.last_line(said)
    if code == 255 and "Permission denied" in said:
        return f"{shown} refuses the key ({last}): set `user` and `identity`, or load the key into the ssh agent"
    if code == 255:
        return f"cannot reach {shown}: {last or 'ssh said nothing'}"
    if code in (126, 127):
        return f"{shown} has no such Python ({last}): set `python` in the target's `reach`"
    return None


def _file(target: Target, key: str) -> str:
    """A path as a value of `ssh -o`, which splits words and replaces %-tokens and variables."""
    path = str(Path(target.reach_settings[key]).expanduser().absolute())
    if re.search(r'["$\\\x00-\x1f]', path):
        raise TargetError(f"target {target.name!r}: {key} {path!r} has characters that ssh would read otherwise")
    return '"' + path.replace("%", "%%") + '"'
