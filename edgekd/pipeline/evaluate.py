"""Metric of a bundle's artifact on data the user brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.data import DataSpec, load_evaluation
from edgekd.export.bundle import read_manifest
from edgekd.pipeline.artifact import score
from edgekd.student import read_config
from edgekd.tasks import get_task


def evaluate(bundle: str | Path, spec: DataSpec, *, max_length: int | None = None) -> dict[str, Any]:
    """Run the bundle's artifact over the test split (else validation, else all there is), one example at a time.

    Texts are cut to `max_length`, by default as in the run that made the bundle; where its shapes are fixed, to its
    sequence length, as they would be on the device.

    Returns:
        `metric`, `split`, `value`, `ci95` (Wilson) and `n`; `unlabelled`, if some do not count for want of a label.

    Raises:
        ModelError: not a bundle, or one whose files were changed.
        DataError: the data cannot be used or has no labels.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    task = get_task(manifest["task"])
    names = {int(index): str(name) for index, name in read_config(folder)["id2label"].items()}
    split, examples, unlabelled = load_evaluation(spec, kind=task.kind, id2label=names)
    max_length = max_length or manifest.get("max_length")
    length = manifest["artifact"].get("fixed", {}).get("sequence")
    if length is not None:
        max_length = min(max_length or length, length)
    encoded = task.encode(task.load_processor(folder), examples, max_length)
    file = folder / manifest["artifact"]["file"]
    found = {"bundle": str(folder), "split": split, **score(file, task, encoded)}
    return {**found, "unlabelled": unlabelled} if unlabelled else found
