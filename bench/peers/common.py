"""What the scripts that make the artifacts share; each runs in an environment of its own, so this needs only numpy.

    python make_X.py REQUEST.json

The request names the `teacher` folder, the `float` ONNX file, the folder of `inputs`, the folder `out` and the shape
(`sequence` tokens). Each artifact goes to a folder `out/NAME` with a `facts.json`: which file to run in which engine,
the settings, versions and seconds, or why it failed. What has facts is not made again.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Request:
    """What a script is asked to make; `names` are the artifacts wanted."""

    teacher: Path
    float: Path
    inputs: Path
    out: Path
    sequence: int
    names: Sequence[str]
    settings: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The teacher's config.json."""
        config: dict[str, Any] = json.loads((self.teacher / "config.json").read_text(encoding="utf-8"))
        return config

    def examples(self, split: str, *, padded: bool = False) -> Examples:
        """One of the splits: padded to `sequence`, or as long as each example is, as images are anyway."""
        file = self.inputs / f"{split}-padded.npz"
        return Examples(file if padded and file.is_file() else self.inputs / f"{split}-data.npz")


@dataclass(frozen=True)
class Made:
    """One artifact: the `file` to load, in which `engine`, whether its shapes are `fixed`, and with which settings."""

    file: Path
    engine: str = "onnxruntime"
    fixed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


class Examples:
    """Inputs of a model from an .npz file, padded or as long as each example is, as the file says."""

    def __init__(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        self.padded = bool(arrays.pop("padded"))
        self.labels = arrays.pop("labels")
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.labels)

    def feeds(self, index: int) -> Feeds:
        """One example, [1, …]."""
        return self.batch(np.array([index]))

    def batch(self, indices: np.ndarray[Any, Any]) -> Feeds:
        """Some examples; without the columns that are padding in all of them unless the file is padded."""
        picked = {name: values[indices] for name, values in self.arrays.items()}
        mask = picked.get("attention_mask")
        if self.padded or mask is None:
            return picked
        columns = mask.any(axis=0)
        return {name: np.ascontiguousarray(values[:, columns]) for name, values in picked.items()}

    def all_feeds(self) -> Iterator[Feeds]:
        """Every example by itself."""
        for index in range(len(self)):
            yield self.feeds(index)


def main(makers: Mapping[str, Callable[[Request, Path], Made]], packages: Sequence[str]) -> None:
    """Make what is asked and not there yet; one that fails is told with its reason and does not keep the others."""
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folders = {key: Path(told[key]) for key in ("teacher", "float", "inputs", "out")}
    request = Request(**folders, sequence=told["sequence"], names=told["names"], settings=told["settings"])
    for name in request.names:
        folder = request.out / name
        if (folder / "facts.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        # Some leave files of their own where they run.
        os.chdir(folder)
        began = time.monotonic()
        try:
            made = makers[name](request, folder)
            facts: dict[str, Any] = {
                "file": made.file.relative_to(folder).as_posix(), "engine": made.engine, "fixed": made.fixed,
                "settings": dict(made.settings),
            }  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the reason is the result
            traceback.print_exc()
            facts = {"failed": reason(error)}
        facts |= {"seconds": time.monotonic() - began, "versions": versions(packages)}
        (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(name, facts.get("failed", "made"), f"{facts['seconds']:.0f} s", flush=True)


def reason(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
