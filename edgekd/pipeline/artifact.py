"""From a student to the ONNX file that would ship, and what is known of that file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.context import Budget
from edgekd.errors import DataError
from edgekd.export.lower import lower, precision_of
from edgekd.export.onnx import export_float
from edgekd.export.parity import Parity, onnx_logits, require_parity, torch_logits
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import Samples
from edgekd.student import Student
from edgekd.target import Target
from edgekd.tasks import Encoded, Task, correct, score_interval

PARITY_EXAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One ONNX file: its form, its agreement with torch, and the parity of the float graph it was made from."""

    file: Path
    lowering: str
    parity: Parity
    float_parity: Parity

    @property
    def precision(self) -> str:
        """`fp32` or `int8`."""
        return precision_of(self.lowering)


def build(student: Student, task: Task, examples: Encoded, folder: Path, *, lowering: str | None = None) -> Artifact:
    """Export and lower the student into `folder/model.onnx`, with both parity gates on real examples.

    `lowering` overrides the student's own quantization; a student without one is lowered as plain float32.

    Raises:
        StageError: a graph does not say what the torch model says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quantization: dict[str, Any] = student.quantization or {}
    form = lowering or quantization.get("lowering", "fp32")
    graph = export_float(student, task.name, folder / "float.onnx")
    file = lower(
        graph,
        folder / "model.onnx",
        form,
        ranges={name: (low, high) for name, (low, high) in quantization.get("ranges", {}).items()} or None,
        model_type=student.model.config.model_type,
    )
    sample = examples.take(np.arange(min(len(examples), PARITY_EXAMPLES), dtype=np.int64))
    reference = torch_logits(student.model, sample)
    float_parity = require_parity(reference, onnx_logits(graph, sample), "fp32", "the exported float graph")
    parity = require_parity(reference, onnx_logits(file, sample), precision_of(form), f"the {form} graph")
    graph.unlink()
    return Artifact(file=file, lowering=form, parity=parity, float_parity=float_parity)


def timed(files: Sequence[Path], target: Target, budget: Budget, settings: Settings | None = None) -> list[Samples]:
    """Measure ONNX files interleaved on the target at the budget's batch, sequence and threads."""
    subjects = [Subject(name=str(i), path=file) for i, file in enumerate(files)]
    return measure(
        subjects,
        target=target,
        batch=budget.batch,
        sequence=budget.sequence,
        threads=budget.threads,
        settings=settings,
    )


def score(file: Path, task: Task, encoded: Encoded) -> dict[str, Any]:
    """Metric of an ONNX file, one unpadded example at a time: `metric`, `value`, `ci95` (Wilson) and `n`.

    Raises:
        DataError: no example has a label.
    """
    if encoded.labels is None:
        raise DataError("none of the examples has a label, so nothing can be scored; name the label column")
    logits = onnx_logits(file, encoded)
    hits = correct(logits, encoded.labels)
    interval = list(score_interval(hits))
    return {"metric": task.metric, "value": task.score(logits, encoded.labels), "ci95": interval, "n": len(hits)}
