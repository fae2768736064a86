"""From a student to the file that would ship, and what is known of that file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.context import Budget
from edgekd.errors import DataError, TargetError
from edgekd.export.blame import explain
from edgekd.export.lower import NOT_FROM_ONNX, precision_of
from edgekd.export.onnx import export_float
from edgekd.export.parity import Parity, compare, onnx_logits, require_parity, torch_logits
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import Samples
from edgekd.quantize.forms import (
    EXAMPLES,
    find_ranges,
    form_logits,
    needs_examples,
    sample,
    write_form,
    write_tflite,
)
from edgekd.student import Student
from edgekd.target import Target
from edgekd.tasks import Encoded, Task, correct, score_interval

PARITY_EXAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One file: its form, its agreement with torch, and the parity of the float graph it was made from, if any.

    `shapes` are its fixed batch and sequence length, empty where they are free.
    """

    file: Path
    lowering: str
    parity: Parity
    float_parity: Parity | None
    shapes: dict[str, int]

    @property
    def precision(self) -> str:
        """`fp32`, `fp16` or `int8`."""
        return precision_of(self.lowering)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a file is made for: the target, the budget that fixes its shapes, and examples to calibrate on, if any."""

    target: Target
    budget: Budget
    calibration: Encoded | None = None


def build(
    student: Student,
    task: Task,
    examples: Encoded,
    folder: Path,
    *,
    lowering: str | None = None,
    place: Place | None = None,
    gate: bool = True,
) -> Artifact:
    """Export and lower the student into `folder`, with both parity gates on real examples.

    `lowering` overrides the student's own quantization; a student without one is lowered as plain float32. Without a
    `place` it is made for ONNX Runtime in general, with free shapes. Without `gate` a file of lower precision may say
    what it likes: how far it agrees is then only noted.

    Raises:
        StageError: a graph does not say what the torch model says.
        ModelError: the file has operators that the target does not run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    form = lowering or (student.quantization or {}).get("lowering", "fp32")
    sampled = examples.take(np.arange(min(len(examples), PARITY_EXAMPLES), dtype=np.int64))
    reference = torch_logits(student.model, sampled)
    graph = None if form in NOT_FROM_ONNX else export_float(student, task.name, folder / "float.onnx")
    file = write(student, task, graph, form, folder, place)
    float_parity = None
    if graph is not None:
        float_parity = require_parity(reference, onnx_logits(graph, sampled), "fp32", "the exported float graph")
    logits, precision = form_logits(file, sampled), precision_of(form)
    if gate or precision == "fp32":
        why = None if graph is None else explain(graph, file, sampled, precision)
        parity = require_parity(reference, logits, precision, f"the {form} graph", why)
    else:
        parity = compare(reference, logits)
    if graph is not None:
        graph.unlink()
    shapes = {}
    if place is not None and place.target.is_static:
        shapes = {"batch": place.budget.batch, **({"sequence": place.budget.sequence} if task.kind == "text" else {})}
    return Artifact(file=file, lowering=form, parity=parity, float_parity=float_parity, shapes=shapes)


def write(student: Student, task: Task, graph: Path | None, form: str, folder: Path, place: Place | None) -> Path:
    """The file of one form; ranges are the student's own, else calibrated on the examples of the place.

    Raises:
        DataError: the form needs ranges and there are no examples.
    """
    quantization: dict[str, Any] = student.quantization or {}
    ranges = quantization.get("ranges") if quantization.get("lowering") == form else None
    examples = None
    if needs_examples(form) and ranges is None:
        if place is None or place.calibration is None:
            raise DataError(f"{form} needs examples to find the ranges of activations: give data")
        count, seed = int(quantization.get("calibration", EXAMPLES)), int(quantization.get("seed", 0))
        examples = sample(place.calibration, count, seed=seed)
    if graph is None:
        if place is None or examples is None:
            raise TargetError(f"{form} is made for one target and with examples; give both")
        return write_tflite(student, task, folder / "model.tflite", examples, place.budget)
    if examples is not None:
        ranges = find_ranges(graph, form, examples, observer=quantization.get("observer", "minmax"))
    elif ranges is not None:
        ranges = {name: (low, high) for name, (low, high) in ranges.items()}
    target, budget = (place.target, place.budget) if place is not None else (None, None)
    return write_form(student, graph, form, folder / "model.onnx", target=target, budget=budget, ranges=ranges)


def float_forms(target: Target) -> tuple[str, ...]:
    """The forms in which a student without quantization may ship, preferred first; plain fp32 first on a CPU."""
    forms = tuple(form for form in target.forms if form in ("fp32", "fp32_fused", "fp32_lean", "fp16"))
    return tuple(reversed(forms)) if target.device == "cpu" else forms


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
    """Metric of an artifact: `metric`, `value`, `ci95` (Wilson) and `n`.

    One unpadded example at a time, or in the artifact's own shapes where they are fixed.

    Raises:
        DataError: no example has a label.
    """
    if encoded.labels is None:
        raise DataError("none of the examples has a label, so nothing can be scored; name the label column")
    logits = form_logits(file, encoded)
    hits = correct(logits, encoded.labels)
    interval = list(score_interval(hits))
    return {"metric": task.metric, "value": task.score(logits, encoded.labels), "ci95": interval, "n": len(hits)}
