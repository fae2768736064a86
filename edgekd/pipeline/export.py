"""A student folder as a bundle, without a run around it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekd import __version__
from edgekd.context import Budget
from edgekd.data import DataSpec, load_evaluation, load_splits
from edgekd.errors import DataError, TargetError
from edgekd.export.bundle import MANIFEST, seal
from edgekd.files import explained, publish, require_place
from edgekd.latency.bench import Settings
from edgekd.pipeline.artifact import Place, build, float_forms, score
from edgekd.pipeline.finish import artifact_section, estimate_section, layout, versions, with_size
from edgekd.pipeline.gauge import gauge
from edgekd.pipeline.setup import check_length, id2label
from edgekd.quantize.forms import needs_examples
from edgekd.report.card import model_card
from edgekd.student import Student, load_student, local_folder, read_config
from edgekd.target import Target
from edgekd.tasks import Encoded, Processor, Task, example_feeds, get_task, infer_task


def export(
    source: str | Path, out: str | Path, *, target: Target, budget: Budget, data: DataSpec | None = None
) -> dict[str, Any]:
    """Write a student folder (non-uniform shapes and quantization included) as a bundle; returns its manifest.

    It takes the form and shapes of the target. Without data, parity is checked on made-up inputs and no metric is
    stated.

    Raises:
        ModelError: the folder cannot be loaded, or has operators that the target does not run.
        TargetError: the student was quantized to a form that the target does not run.
        DataError: the form needs examples to calibrate on, and there are none.
        StoreError: `out` is something other than an empty folder or a bundle, or cannot be written.
        StageError: the graph does not say what the torch model says.
    """
    final = Path(out)
    require_place(final, marker=MANIFEST, why="it is not a bundle")
    folder = local_folder(str(source))
    task = get_task(infer_task(read_config(folder)))
    student, processor = load_student(folder, auto_class=task.auto_class), task.load_processor(folder)
    form = form_for(student, target)
    length = check_length(processor, budget) if task.kind == "text" else None
    length = length if target.is_static else None
    split, encoded = _examples(task, processor, student, data, length)
    calibration = _calibration(form, task, processor, student, data, target, length)
    with explained("write", final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as scratch:
        place = Place(target=target, budget=budget, calibration=calibration)
        artifact = build(student, task, encoded, Path(scratch), lowering=form, place=place)
        gauged = gauge(artifact, target, budget, Path(scratch) / "device", teacher=None, look=Settings())
        verdict = with_size(gauged.verdict, artifact.file.stat().st_size, budget)
        draft = Path(scratch) / "bundle"
        layout(draft, artifact, student, gauged)
        manifest = {
            "edgekd": __version__,
            "task": task.name,
            "labels": [name for _, name in sorted(id2label(student.model.config).items())],
            "teacher": None,
            "artifact": artifact_section(artifact, student, draft, gauged),
            "quality": {"split": split, **score(artifact.file, task, encoded)} if data is not None else None,
            "latency": [gauged.measurement.to_dict()],
            **estimate_section(gauged),
            "verdict": [verdict.to_dict()],
            "ledger": [],
            "versions": versions(),
        }
        seal(draft, manifest, model_card(manifest))
        publish(draft, final, marker=MANIFEST)
    return manifest


def form_for(student: Student, target: Target) -> str:
    """The form a student is exported in: its own, else the target's float form, else the first it runs.

    Raises:
        TargetError: the student was quantized to a form that the target does not run.
    """
    own: str | None = (student.quantization or {}).get("lowering")
    if own is None:
        return next(iter(float_forms(target)), target.forms[0])
    if own not in target.forms:
        raise TargetError(
            f"this student was quantized to {own}, which target {target.name} does not run (it runs "
            f"{', '.join(target.forms)}): export the folder it was quantized from, "
            f"or quantize that anew with `edgekd quantize FOLDER --target {target.name} …`"
        )
    return own


def _calibration(
    form: str,
    task: Task,
    processor: Processor,
    student: Student,
    data: DataSpec | None,
    target: Target,
    length: int | None,
) -> Encoded | None:
    """Training examples, where the form needs ranges that the student does not bring along."""
    if not needs_examples(form) or (student.quantization or {}).get("ranges"):
        return None
    if data is None:
        raise DataError(
            f"target {target.name} runs {form}, whose ranges of activations are found on examples: give --data"
        )
    splits = load_splits(data, kind=task.kind, id2label=id2label(student.model.config))
    return task.encode(processor, splits.train, length)


@dataclass(frozen=True, eq=False)
class _MadeUp:
    """Inputs of the usual shape where there is no data: enough to compare two forms of one model."""

    feeds: dict[str, npt.NDArray[Any]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.ones(len(self), dtype=np.int64)

    @property
    def labels(self) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        return "made up"

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))

    def collate(self, indices: npt.NDArray[np.int64], length: int | None = None) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(values[indices]) for name, values in self.feeds.items()}

    def take(self, indices: npt.NDArray[np.int64]) -> _MadeUp:
        return _MadeUp({name: values[indices] for name, values in self.feeds.items()})


def _examples(
    task: Task, processor: Processor, student: Student, data: DataSpec | None, length: int | None
) -> tuple[str, Encoded]:
    if data is None:
        return "none", _MadeUp(example_feeds(task, processor, student.model.config.to_dict(), 8, length))
    split, examples, _ = load_evaluation(data, kind=task.kind, id2label=id2label(student.model.config))
    return split, task.encode(processor, examples, length)
