"""One file that holds all a training run needs to go on: tensors, and its counters as JSON in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgekd.files import explained

Groups = Mapping[str, Mapping[str, Tensor]]
_FILE = "checkpoint.safetensors"


def save_checkpoint(folder: Path, state: Mapping[str, Any], groups: Groups) -> None:
    """Write state and named groups of tensors; a reader sees the old checkpoint or the new one, never a part."""
    tensors = {
        f"{group}/{name}": tensor.detach().contiguous()
        for group, part in groups.items()
        for name, tensor in part.items()
    }
    file, partial = folder / _FILE, folder / f"{_FILE}.partial"
    with explained("write the checkpoint", file):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"state": json.dumps(state)})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)


def load_checkpoint(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """Read the checkpoint of the run with this key (`state["key"]`), or None where there is none.

    A file of another run, or one that cannot be read, is as good as none.
    """
    file = folder / _FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            state = json.loads((opened.metadata() or {}).get("state", "{}"))
            if state.get("key") != key:
                return None
            groups: dict[str, dict[str, Tensor]] = {}
            for path in opened.keys():  # noqa: SIM118 - not a mapping
                group, _, name = path.partition("/")
                groups.setdefault(group, {})[name] = opened.get_tensor(path)
    except (SafetensorError, OSError, ValueError):
        return None
    return state, groups


def rng_state(device: torch.device) -> Tensor:
    """State of torch's generators, uint8: the CPU's, followed by the device's own where there is one."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].contiguous())
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:].contiguous(), device)
