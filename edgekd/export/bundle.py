"""The deployable folder: ONNX, Hugging Face config, tokenizer or image processor, model card, manifest.

Layout: `onnx/model.onnx`, `config.json`, processor files, `README.md`, `edgekd.json`. optimum's ORTModel classes,
transformers.js and bare onnxruntime load it as it is. A target that takes no ONNX has `tflite/model.tflite` instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import ModelError
from edgekd.files import sha256_file
from edgekd.student import SECTION, Student, copy_processor

SCHEMA = 1
ARTIFACT = "onnx/model.onnx"
MANIFEST = "edgekd.json"


def assemble(folder: Path, *, artifact: Path, student: Student, place: str = ARTIFACT) -> None:
    """Lay out everything but the manifest and the card in `folder`; `place` is where in it the artifact goes."""
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(artifact, folder / place)
    config = {key: value for key, value in student.model.config.to_dict().items() if key != SECTION}
    config["architectures"] = [type(student.model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_processor(student.processor_dir, folder)


def seal(folder: Path, manifest: Mapping[str, Any], card: str) -> None:
    """Write the card, then the manifest with the SHA-256 of every other file: last, so that it vouches for them."""
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    whole = {"schema": SCHEMA, **manifest, "files": hashes}
    (folder / MANIFEST).write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a bundle.

    Raises:
        ModelError: there is none, it is of a newer schema, or a file is missing or was changed.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ModelError(f"{folder} is not a bundle: it has no {MANIFEST}; give the folder that `edgekd compress` made")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int):
        raise ModelError(f"{file} is damaged: it is no JSON object with a number as schema")
    if schema > SCHEMA:
        raise ModelError(f"{file} has schema {schema}; this edgekd reads up to {SCHEMA}: update edgekd")
    hashes = manifest.get("files")
    if not isinstance(hashes, dict):
        raise ModelError(f"{file} is damaged: it does not say what files there are")
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is incomplete: {name} is missing")
        if sha256_file(folder / name) != digest:
            raise ModelError(f"{folder / name} is not the file that was bundled: its SHA-256 differs from {MANIFEST}")
    return manifest
