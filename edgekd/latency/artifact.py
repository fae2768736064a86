"""Which ONNX file a path means, and how it asks to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.errors import ModelError
from edgekd.files import sha256_file
from edgekd.latency.feeds import read_json
from edgekd.target_fields import SESSION_OPTIONS

MANIFEST = "edgekd.json"
USUAL_PLACES = ("onnx/model.onnx", "model.onnx")


@dataclass(frozen=True)
class Artifact:
    """An ONNX file and the session options it ships with."""

    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def find_artifact(model: str | Path) -> Artifact:
    """The ONNX file of an .onnx path, a bundle (`edgekd.json` names it), or a folder with one model in it.

    A bundle's `artifact.needs.session_options` are those it needs to be fast.

    Raises:
        ModelError: there is no model, or more than one to choose from; or the bundle is damaged.
    """
    path = Path(model)
    if path.is_file():
        return Artifact(path)
    if not path.is_dir():
        raise ModelError(f"there is no model {path}: expected an .onnx file, a bundle or a folder with model.onnx")
    manifest = read_json(path / MANIFEST)
    if (path / MANIFEST).is_file() and not manifest:
        raise ModelError(f"{path / MANIFEST} is damaged: it holds no JSON object; make the bundle again")
    described = manifest.get("artifact")
    if isinstance(described, dict) and isinstance(described.get("file"), str):
        file = path / described["file"]
        if not file.is_file():
            raise ModelError(f"the bundle {path} is incomplete: {MANIFEST} names {described['file']}, which is missing")
        hashes = manifest.get("files")
        if isinstance(hashes, dict) and hashes.get(described["file"]) not in (None, sha256_file(file)):
            raise ModelError(f"{file} is not the file that was bundled: its SHA-256 differs from {MANIFEST}")
        session = (described.get("needs") or {}).get("session_options") or {}
        return Artifact(file, {key: value for key, value in session.items() if key in SESSION_OPTIONS})
    for place in USUAL_PLACES:
        if (path / place).is_file():
            return Artifact(path / place)
    found = sorted(path.glob("*.onnx")) + sorted(path.glob("onnx/*.onnx"))
    if len(found) == 1:
        return Artifact(found[0])
    if found:
        names = ", ".join(str(item.relative_to(path)) for item in found)
        raise ModelError(f"{path} holds several models ({names}): give the one to use")
    raise ModelError(f"{path} holds no .onnx file{_hint(path)}")


def _hint(path: Path) -> str:
    weights = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    return ": it is a PyTorch model; make a bundle of it with `edgekd export`" if weights else ""
