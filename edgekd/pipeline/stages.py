"""Run one stage after the other: skip what is done, check what each promises, measure, keep the ledger."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.arch import Arch
from edgekd.context import Budget, Context, Progress
from edgekd.errors import StageError
from edgekd.families import arch_of
from edgekd.files import sha256_json
from edgekd.latency.bench import Settings
from edgekd.pipeline.artifact import Artifact, Place, build, float_forms, score, timed
from edgekd.pipeline.gauge import how_known
from edgekd.pipeline.setup import Setup
from edgekd.quantize import Quantize
from edgekd.stages import Stage
from edgekd.store import RunFolder, StageFolder
from edgekd.student import Student, load_student
from edgekd.target import Target

FORMAT = 1
"""Part of every stage key: raise it when a change makes stages of earlier versions unusable."""
LEDGER = Settings(blocks=40)
"""The ledger's latencies are for orientation; the verdict measures for longer."""
PROBE = 8
"""Examples on which reloading must give the same logits."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """The stages of one target in one run."""

    run: RunFolder
    setup: Setup
    target: Target
    budget: Budget
    seed: int
    teacher_graph: Path
    suffix: str
    """Added to stage folder names where a run has several targets."""
    progress: Progress

    @property
    def cache(self) -> Path:
        """What stages and rounds share."""
        return self.run.path / ".cache"


@dataclass(frozen=True)
class Travelled:
    """A student at the end of its stages, the ledger of the way, and the key of it all."""

    student: Student
    ledger: list[dict[str, Any]]
    key: str


def travel(track: Track, stages: Mapping[str, Stage], *, strictness: float) -> Travelled:
    """Run all stages in order from the teacher's own weights; finished ones with the same key are taken as they are.

    Raises:
        StageError: a stage breaks its promise.
    """
    student, ledger = track.setup.teacher, []
    key = sha256_json({"format": FORMAT, **track.setup.key, "target": track.target.fingerprint, "seed": track.seed})
    lowering = expected_lowering(stages, track.target)
    for index, (name, stage) in enumerate(stages.items(), start=1):
        key = _stage_key(key, name, stage, track, strictness if name == "search" else 1.0)
        folder = track.run.stage(index, name + track.suffix, key)
        if folder.notice:
            track.progress.say(folder.notice)
        if folder.complete:
            track.progress.say(f"{name}: done before, taken from {folder.path.name}")
        else:
            track.progress.say(f"{name}: {track.target.name}")
            folder = _run_stage(track, folder, name, stage, student, lowering, strictness)
        student = load_student(folder.path, auto_class=track.setup.task.auto_class)
        ledger.append(dict(folder.entry or {}))
    return Travelled(student, ledger, key)


def expected_lowering(stages: Mapping[str, Stage], target: Target) -> str:
    """The form in which the artifact is expected to ship."""
    quantize = stages.get("quantize")
    if isinstance(quantize, Quantize):
        return quantize.expected_on(target)
    return "fp32_fused" if "fp32_fused" in target.forms else next(iter(float_forms(target)), target.forms[0])


def _stage_key(previous: str, name: str, stage: Stage, track: Track, strictness: float) -> str:
    settings = {k: v for k, v in dataclasses.asdict(stage).items() if not k.startswith("checkpoint")}
    budget = dataclasses.asdict(track.budget)
    return sha256_json([previous, name, settings, budget, strictness])


def _run_stage(
    track: Track, folder: StageFolder, name: str, stage: Stage, student: Student, lowering: str, strictness: float
) -> StageFolder:
    began = time.monotonic()
    work = track.run.begin(folder)
    ctx = Context(
        teacher=track.setup.teacher,
        task=track.setup.task,
        processor=track.setup.processor,
        train=track.setup.train,
        validation=track.setup.validation,
        test=None,
        target=track.target,
        budget=track.budget,
        work=work,
        cache=track.cache,
        progress=track.progress,
        teacher_graph=track.teacher_graph,
        lowering=lowering,
        seed=track.seed,
        strictness=strictness,
    )
    result = stage.run(student, ctx)
    seconds = time.monotonic() - began
    draft = track.run.draft(folder)
    result.save(draft)
    check_promises(result, draft, track.setup)
    entry = {"stage": name, "seconds": round(seconds, 2), **_measured(track, result, student, work)}
    entry["details"] = plain(ctx.notes)
    return track.run.commit(folder, draft, entry)


def check_promises(student: Student, saved: Path, setup: Setup) -> None:
    """Shapes match the arch, outputs are finite, and the saved folder gives the same logits.

    Raises:
        StageError: one of these does not hold.
    """
    sources = tuple(layer.source for layer in student.arch.layers)
    if arch_of(student.model, sources) != student.arch:
        raise StageError(f"the model does not have the shapes it is said to have: {student.arch.describe()}")
    batch = setup.validation.collate(np.arange(min(PROBE, len(setup.validation)), dtype=np.int64))
    batch.pop("labels", None)
    again = load_student(saved, auto_class=setup.task.auto_class)
    student.model.eval()
    with torch.no_grad():
        here, there = student.model(**batch).logits, again.model(**batch).logits
    if not bool(torch.isfinite(here).all()):
        raise StageError("the student gives logits that are not finite")
    if not torch.equal(here, there):
        raise StageError(f"saving and loading changes the logits by {float((here - there).abs().max()):.2e}")


def _measured(track: Track, result: Student, before: Student, work: Path) -> dict[str, Any]:
    """Metric, latency and size of what the stage made; a stage that only plans adds no new artifact."""
    if result.model is before.model and result.quantization == before.quantization:
        return {"metric": None, "latency": {"kind": "unavailable", "reason": "the stage changes no weights"}}
    place = Place(target=track.target, budget=track.budget, calibration=track.setup.train)
    artifact = build(
        result,
        track.setup.task,
        track.setup.validation,
        work / "ledger",
        place=place if result.quantization is not None else None,
    )
    metric = score(artifact.file, track.setup.task, track.setup.validation)["value"]
    return {
        "metric": metric,
        "latency": _latency(track, artifact),
        "size_bytes": artifact.file.stat().st_size,
        "precision": artifact.precision,
        "shape": result.arch.describe(),
    }


def _latency(track: Track, artifact: Artifact) -> dict[str, Any]:
    """A short measurement beside the teacher, for orientation; none where the target is not measured here."""
    if reason := how_known(track.target):
        return {"kind": "unavailable", "reason": reason}
    teacher, sample = timed([track.teacher_graph, artifact.file], track.target, track.budget, LEDGER)
    p50, reference = float(np.median(sample.ms)), float(np.median(teacher.ms))
    return {
        "kind": "measured",
        "p50_ms": p50,
        "p95_ms": float(np.percentile(sample.ms, 95)),
        "teacher_p50_ms": reference,
        "speedup": reference / p50,
    }


def plain(value: Any) -> Any:
    """Notes as plain data for JSON: numpy numbers, tuples and shapes unwrapped."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value.describe() if isinstance(value, Arch) else value
