"""Post-training quantization: build the forms, score them on validation, measure them, keep the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import DataError
from edgekd.export.lower import Ranges, calibrate, lower, precision_of
from edgekd.export.onnx import export_float
from edgekd.export.parity import Logits, onnx_logits, require_parity
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.student import Student

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.quantize import Quantize

INT8 = ("int8_dynamic", "int8_dynamic_fused", "int8_static")
FLOAT = "fp32_fused"


@dataclass(frozen=True)
class Candidate:
    """One form: its file, its metric on validation and its median latency in ms (None if not measured)."""

    lowering: str
    file: Path
    metric: float
    p50_ms: float | None = None


def quantize(settings: Quantize, student: Student, ctx: Context) -> Student:
    """See `Quantize`.

    Raises:
        DataError: no training example to calibrate on.
    """
    graph = export_float(student, ctx.task.name, ctx.work / "float.onnx")
    wanted = {"auto": (*INT8, FLOAT), "int8": INT8}.get(settings.lowering, (settings.lowering,))
    ranges = _ranges(graph, settings, ctx) if "int8_static" in wanted else None
    reference = onnx_logits(graph, ctx.validation)
    float_metric = _metric(reference, ctx)
    candidates = _build(graph, wanted, ranges, reference, student, ctx)
    if len(candidates) > 1:
        candidates = _timed(candidates, ctx)
    chosen = choose(candidates, float_metric, settings.tolerance)
    ctx.notes["float_metric"] = float_metric
    ctx.notes["candidates"] = [
        {"lowering": c.lowering, "metric": c.metric, "p50_ms": c.p50_ms, "size_bytes": c.file.stat().st_size}
        for c in candidates
    ]
    ctx.notes["chosen"] = chosen.lowering
    kept: dict[str, Any] = {"lowering": chosen.lowering}
    if chosen.lowering == "int8_static" and ranges is not None:
        kept["ranges"] = {name: list(pair) for name, pair in ranges.items()}
    return replace(student, quantization=kept)


def choose(candidates: list[Candidate], float_metric: float, tolerance: float) -> Candidate:
    """The fastest form within `tolerance` of the float metric; if none is, the one with the best metric."""
    good = [c for c in candidates if c.metric >= float_metric - tolerance]
    if good:
        return min(good, key=lambda c: (c.p50_ms or 0.0, -c.metric))
    return max(candidates, key=lambda c: (c.metric, -(c.p50_ms or 0.0)))


def _ranges(graph: Path, settings: Quantize, ctx: Context) -> Ranges:
    if not len(ctx.train):
        raise DataError("static quantization needs training examples to calibrate on, and there are none")
    chosen = np.random.default_rng(ctx.seed + 2).permutation(len(ctx.train))[: settings.calibration]
    feeds = []
    for index in chosen:
        batch = ctx.train.collate(np.array([index]), int(ctx.train.lengths[index]))
        feeds.append({name: value.numpy() for name, value in batch.items() if name != "labels"})
    return calibrate(graph, feeds)


def _build(
    graph: Path, wanted: tuple[str, ...], ranges: Ranges | None, reference: Logits, student: Student, ctx: Context
) -> list[Candidate]:
    built = []
    for name in wanted:
        file = lower(graph, ctx.work / f"{name}.onnx", name, ranges=ranges, model_type=student.model.config.model_type)
        logits = onnx_logits(file, ctx.validation)
        require_parity(reference, logits, precision_of(name), name)
        built.append(Candidate(name, file, _metric(logits, ctx)))
    return built


def _metric(logits: Logits, ctx: Context) -> float:
    labels = ctx.validation.labels
    if labels is None:
        raise DataError("the validation split has no labels and was not labelled by the teacher")
    return ctx.task.score(logits, labels)


def _timed(candidates: list[Candidate], ctx: Context) -> list[Candidate]:
    """The candidates with their median latency, measured interleaved in one run."""
    subjects = [Subject(name=c.lowering, path=c.file) for c in candidates]
    samples = measure(
        subjects,
        target=ctx.target,
        batch=ctx.budget.batch,
        sequence=ctx.budget.sequence,
        threads=ctx.budget.threads,
        settings=Settings(blocks=60, seed=ctx.seed),
    )
    medians: Mapping[str, float] = {s.name: float(np.median(s.ms)) for s in samples}
    return [replace(c, p50_ms=medians[c.lowering]) for c in candidates]
