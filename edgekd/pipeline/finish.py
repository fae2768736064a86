"""The end of the way: the final artifact, its quality, the verdict, the manifest."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__
from edgekd.context import Budget
from edgekd.export.bundle import ARTIFACT, assemble, seal
from edgekd.export.onnx import OPSET
from edgekd.files import sha256_file
from edgekd.latency.bench import Settings
from edgekd.latency.stats import Measurement, Samples, join, summarize
from edgekd.latency.verdict import FAIL, INCONCLUSIVE, Verdict, decide
from edgekd.pipeline.artifact import Artifact, build, timed
from edgekd.pipeline.baseline import Baseline, quality
from edgekd.pipeline.setup import Setup
from edgekd.report.card import model_card
from edgekd.student import Student
from edgekd.target import Target

LOOK = Settings(blocks=120, max_seconds=60)
"""The first look at the artifact's latency; further ones double the number of samples."""
PACKAGES = ("torch", "transformers", "optimum", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An artifact with what was measured of it."""

    artifact: Artifact
    measurement: Measurement
    verdict: Verdict
    quality: Mapping[str, Any]
    accuracy_met: bool


def final_artifact(student: Student, setup: Setup, target: Target, budget: Budget, folder: Path) -> Artifact:
    """Build the file that ships; a float student takes the fused form only where it is measured to be faster."""
    if student.quantization is not None:
        return build(student, setup.task, setup.validation, folder)
    forms = [
        build(student, setup.task, setup.validation, folder / form, lowering=form) for form in ("fp32", "fp32_fused")
    ]
    plain, fused = timed([form.file for form in forms], target, budget, Settings(blocks=60))
    return forms[int(np.median(fused.ms) < np.median(plain.ms))]


def judged(artifact: Artifact, setup: Setup, base: Baseline, target: Target, budget: Budget) -> Judged:
    """Measure the artifact beside the teacher until the verdict is clear (bounded), and score it."""
    looks: list[tuple[Samples, Samples]] = []

    def more(look: int) -> Measurement:
        settings = replace(LOOK, blocks=LOOK.blocks * 2 ** max(look - 1, 0), memory=look == 0, seed=look)
        teacher, student = timed([base.graph, artifact.file], target, budget, settings)
        looks.append((teacher, student))
        return summarize(
            join([student for _, student in looks]), target=target.name, baseline=join([t for t, _ in looks])
        )

    measurement, verdict = decide(more, latency_p95_ms=budget.latency_p95_ms, speedup=budget.speedup)
    verdict = with_size(verdict, artifact.file.stat().st_size, budget)
    scored = quality(setup, artifact.file)
    scored["retained"] = scored["value"] / base.reported if base.reported else None
    return Judged(
        artifact=artifact,
        measurement=measurement,
        verdict=verdict,
        quality=scored,
        accuracy_met=scored["value"] >= accuracy_floor(base, budget),
    )


def with_size(verdict: Verdict, size_bytes: int, budget: Budget) -> Verdict:
    """The verdict with the size budget judged too."""
    if budget.size_mb is None:
        return verdict
    size = size_bytes / 1e6
    met = size <= budget.size_mb
    reason = (
        f"{verdict.reason}; size {size:.2f} MB is {'within' if met else 'over'} the budget of {budget.size_mb:g} MB"
    )
    return replace(verdict, reason=reason, status=verdict.status if met else FAIL)


def accuracy_floor(base: Baseline, budget: Budget) -> float:
    """The least metric allowed on the reported split; minus infinity if none was asked."""
    if budget.min_accuracy is not None:
        return budget.min_accuracy
    return base.reported - budget.accuracy_drop if budget.accuracy_drop is not None else float("-inf")


def exit_code(judgements: list[Judged]) -> int:
    """0 all met, 3 a latency or size budget missed, 4 an accuracy floor missed, 5 inconclusive."""
    statuses = [judgement.verdict.status for judgement in judgements]
    if FAIL in statuses:
        return 3
    if not all(judgement.accuracy_met for judgement in judgements):
        return 4
    return 5 if INCONCLUSIVE in statuses else 0


def write_bundle(
    folder: Path,
    judgement: Judged,
    student: Student,
    setup: Setup,
    base: Baseline,
    *,
    ledger: list[dict[str, Any]],
    rounds: list[dict[str, Any]],
    recipe_hash: str,
    seed: int,
    budget: Budget,
) -> dict[str, Any]:
    """Write the bundle folder and return its manifest."""
    assemble(folder, artifact=judgement.artifact.file, student=student)
    manifest: dict[str, Any] = {
        "edgekd": __version__,
        "task": setup.task.name,
        "labels": [name for _, name in sorted(student.model.config.id2label.items())],
        "teacher": {
            "metric": setup.metric,
            "value": base.reported,
            "n": base.n,
            "p50_ms": judgement.measurement.teacher_p50_ms,
            "size_bytes": base.size_bytes,
        },
        "artifact": artifact_section(judgement.artifact, student, folder),
        "quality": dict(judgement.quality),
        "budget": {key: value for key, value in vars(budget).items() if value is not None},
        "latency": [judgement.measurement.to_dict()],
        "verdict": [judgement.verdict.to_dict()],
        "accuracy_floor_met": judgement.accuracy_met,
        "ledger": ledger,
        "rounds": rounds,
        "versions": versions(),
        "seeds": {"run": seed},
        "recipe": recipe_hash,
    }
    seal(folder, manifest, model_card(manifest))
    return manifest


def artifact_section(artifact: Artifact, student: Student, folder: Path) -> dict[str, Any]:
    """What the manifest says of the ONNX file in `folder`."""
    file = folder / ARTIFACT
    return {
        "file": ARTIFACT,
        "sha256": sha256_file(file),
        "size_bytes": file.stat().st_size,
        "precision": artifact.precision,
        "lowering": artifact.lowering,
        "opset": OPSET,
        "shape": student.arch.describe(),
        "parity": {"float": artifact.float_parity.to_dict(), "shipped": artifact.parity.to_dict()},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the artifact."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
