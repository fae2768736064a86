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
from edgekd.data import DataSpec, load_evaluation
from edgekd.errors import StoreError
from edgekd.export.bundle import MANIFEST, assemble, seal
from edgekd.files import publish
from edgekd.latency.stats import summarize
from edgekd.latency.verdict import judge
from edgekd.pipeline.artifact import build, score, timed
from edgekd.pipeline.finish import artifact_section, versions
from edgekd.pipeline.setup import id2label
from edgekd.report.card import model_card
from edgekd.student import Student, load_student, local_folder, read_config
from edgekd.target import Target
from edgekd.tasks import Encoded, Processor, Task, example_feeds, get_task, infer_task


def export(
    source: str | Path, out: str | Path, *, target: Target, budget: Budget, data: DataSpec | None = None
) -> dict[str, Any]:
    """Write a student folder (non-uniform shapes and quantization included) as a bundle; returns its manifest.

    Without data, parity is checked on made-up inputs and no metric is stated.

    Raises:
        ModelError: the folder cannot be loaded.
        StoreError: `out` is something other than an empty folder or a bundle.
        StageError: the graph does not say what the torch model says.
    """
    folder, final = local_folder(str(source)), Path(out)
    if final.exists() and not (final.is_dir() and (not any(final.iterdir()) or (final / MANIFEST).is_file())):
        raise StoreError(f"will not replace {final}: it is not a bundle; choose another --out")
    task = get_task(infer_task(read_config(folder)))
    student, processor = load_student(folder, auto_class=task.auto_class), task.load_processor(folder)
    split, encoded = _examples(task, processor, student, data)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as scratch:
        artifact = build(student, task, encoded, Path(scratch))
        sample = timed([artifact.file], target, budget)[0]
        measurement = summarize(sample, target=target.name)
        verdict = judge(measurement, latency_p95_ms=budget.latency_p95_ms)
        draft = Path(scratch) / "bundle"
        assemble(draft, artifact=artifact.file, student=student)
        manifest = {
            "edgekd": __version__,
            "task": task.name,
            "labels": [name for _, name in sorted(id2label(student.model.config).items())],
            "teacher": None,
            "artifact": artifact_section(artifact, student, draft),
            "quality": {"split": split, **score(artifact.file, task, encoded)} if data is not None else None,
            "latency": [measurement.to_dict()],
            "verdict": [verdict.to_dict()],
            "ledger": [],
            "versions": versions(),
        }
        seal(draft, manifest, model_card(manifest))
        publish(draft, final, marker=MANIFEST)
    return manifest


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


def _examples(task: Task, processor: Processor, student: Student, data: DataSpec | None) -> tuple[str, Encoded]:
    if data is None:
        return "none", _MadeUp(example_feeds(task, processor, student.model.config.to_dict(), 8))
    split, examples = load_evaluation(data, kind=task.kind, id2label=id2label(student.model.config))
    return split, task.encode(processor, examples, None)
