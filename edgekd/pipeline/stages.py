"""Run one stage after the other: skip what is done, check what each promises, weigh it, keep the ledger."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.arch import Arch
from edgekd.context import Budget, Context, Progress, as_it_is
from edgekd.errors import StageError
from edgekd.export.sparse import compressed_bytes
from edgekd.families import arch_of
from edgekd.families.zeros import lost_zeros
from edgekd.operators import Operators
from edgekd.pipeline.artifact import build, float_forms, score
from edgekd.pipeline.guard import guard
from edgekd.pipeline.keys import FORESEES, root_key, stage_key, target_key
from edgekd.pipeline.setup import Setup
from edgekd.pipeline.sides import Scale
from edgekd.quantize import Quantize
from edgekd.search.front import FILES as FRONT_FILES
from edgekd.stages import SHARED, Stage
from edgekd.store import CACHE, RunFolder, StageFolder
from edgekd.student import Student, load_student
from edgekd.target import Target, load_target, probe

PROBE = 8
"""Examples on which reloading must give the same logits."""
FIGURES = ("metric", "latency", "size_bytes", "compressed_bytes", "flash_bytes", "precision", "shape")
"""What an entry of the ledger says of the student that goes on."""
RARE = ("compressed_bytes", "flash_bytes")
"""Of these, what is left out where it is not known; manifests of earlier versions have none of them."""
ASIDE = "rolled-back"
"""Folder of a stage's folder that holds what the stage made, where that did not go on."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """The stages of one target in one run; `whole` is the setup before it was fitted to the target."""

    run: RunFolder
    setup: Setup
    whole: Setup
    target: Target
    budget: Budget
    seed: int
    teacher_graph: Path
    suffix: str
    """Added to stage folder names where a run has several targets, or goes round again."""
    progress: Progress
    known: dict[str, Any] = field(default_factory=dict)
    """What the guard has found out of files already."""

    @property
    def cache(self) -> Path:
        """What stages and rounds share."""
        return self.run.path / CACHE

    @property
    def scale(self) -> Scale:
        """What the guard weighs with."""
        return Scale(
            setup=self.setup,
            target=self.target,
            budget=self.budget,
            teacher_graph=self.teacher_graph,
            known=self.known,
        )


@dataclass(frozen=True)
class Travelled:
    """A student at the end of its stages, the ledger of the way, and the key of it all."""

    student: Student
    ledger: list[dict[str, Any]]
    key: str


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One stage on its way: its place, and what it is handed."""

    name: str
    stage: Stage
    folder: StageFolder
    setup: Setup
    lowering: str
    strictness: float
    operators: Operators | None

    @property
    def shared(self) -> bool:
        """Whether all targets of the run use the same."""
        return self.name in SHARED


def travel(track: Track, stages: Mapping[str, Stage], *, strictness: float) -> Travelled:
    """Run all stages in order from the teacher's own weights; finished ones with the same key are taken as they are.

    Stages of `SHARED` know nothing of the target, so that every target and round takes up the same folder.

    Raises:
        StageError: a stage breaks its promise.
    """
    student, ledger, parted = track.whole.teacher, [], False
    key = root_key(track.whole, track.seed)
    lowering = expected_lowering(stages, track.target)
    operators = stages.get("operators")
    for index, (name, stage) in enumerate(stages.items(), start=1):
        shared = name in SHARED
        if not shared and not parted:
            key, parted = target_key(key, track.setup, track.target, track.budget), True
        key = stage_key(key, name, stages, strictness=strictness, lowering=lowering)
        step = _Step(
            name=name,
            stage=stage,
            folder=track.run.stage(index, name if shared else name + track.suffix, key),
            setup=(track.whole if shared else track.setup).for_student(student),
            lowering=lowering,
            strictness=strictness,
            operators=operators if isinstance(operators, Operators) and name in FORESEES else None,
        )
        folder = _stage_folder(track, step, student)
        student = load_student(folder.path, auto_class=track.setup.task.auto_class)
        ledger.append(dict(folder.entry or {}))
    return Travelled(student, ledger, key if parted else target_key(key, track.setup, track.target, track.budget))


def _stage_folder(track: Track, step: _Step, student: Student) -> StageFolder:
    """The finished folder of a step: the one that is there, or a new one."""
    folder = step.folder
    if folder.notice:
        track.progress.say(folder.notice)
    if folder.complete:
        track.progress.say(f"{step.name}: done before, taken from {folder.path.name}")
        return folder
    track.progress.say(f"{step.name}: {'all targets' if step.shared else track.target.name}")
    return _run_stage(track, step, student)


def expected_lowering(stages: Mapping[str, Stage], target: Target) -> str:
    """The form in which the artifact is expected to ship."""
    quantize = stages.get("quantize")
    if isinstance(quantize, Quantize):
        return quantize.expected_on(target)
    floats = float_forms(target)
    return "fp32_lean" if "fp32_lean" in floats else next(iter(floats), target.forms[0])


def _run_stage(track: Track, step: _Step, student: Student) -> StageFolder:
    began = time.monotonic()
    work = track.run.begin(step.folder)
    ctx = _context(track, step, work)
    result = without_lost_promises(step.stage.run(student, ctx), track.progress)
    entry: dict[str, Any] = {"stage": step.name, "seconds": round(time.monotonic() - began, 2)}
    draft = track.run.draft(step.folder)
    saved = _save(result, draft, track.setup)
    entry |= _shared(step, saved, work) if step.shared else _weighed(track, step, student, result, saved, ctx)
    if entry.get("kept") is False:
        track.progress.say(f"{step.name}: {entry['why']}")
        draft = track.run.draft(step.folder)
        _save(student, draft, track.setup)
        result.save(draft / ASIDE)
    take_along(work, draft)
    return track.run.commit(step.folder, draft, {**entry, "folder": step.folder.path.name, "details": plain(ctx.notes)})


def without_lost_promises(result: Student, progress: Progress) -> Student:
    """What a stage made; zeros that it did not keep are said to be gone, and not promised any more."""
    if not lost_zeros(result.model, result.sparsity):
        return result
    progress.say("the zeros of a sparse model did not live through this stage: it is dense again")
    return replace(result, sparsity=None)


def take_along(work: Path, folder: Path) -> None:
    """Keep what a stage left for the report: the candidates that search found."""
    for name in FRONT_FILES:
        if (work / name).is_file():
            shutil.copyfile(work / name, folder / name)


def _context(track: Track, step: _Step, work: Path) -> Context:
    """What a stage is handed; a shared one gets this machine and no budget, since it must not depend on either."""
    return Context(
        teacher=track.setup.teacher,
        task=step.setup.task,
        processor=step.setup.processor,
        train=step.setup.train,
        validation=step.setup.validation,
        test=None,
        target=probe(load_target("local")) if step.shared else track.target,
        budget=Budget() if step.shared else track.budget,
        work=work,
        cache=track.cache,
        progress=track.progress,
        teacher_graph=track.teacher_graph,
        lowering="fp32" if step.shared else step.lowering,
        seed=track.seed,
        strictness=1.0 if step.shared else step.strictness,
        reshape=as_it_is if step.operators is None else step.operators.possible(track.setup.teacher).reshape,
    )


def _save(student: Student, folder: Path, setup: Setup) -> Student:
    """Save a student, and load it again as it will be found, promises checked."""
    student.save(folder)
    return check_promises(student, folder, setup)


def check_promises(student: Student, saved: Path, setup: Setup) -> Student:
    """Shapes match the arch, outputs are finite, and the saved folder, which is returned loaded, gives the same logits.

    Raises:
        StageError: one of these does not hold.
    """
    sources = tuple(layer.source for layer in student.arch.layers)
    if arch_of(student.model, sources) != student.arch:
        raise StageError(f"the model does not have the shapes it is said to have: {student.arch.describe()}")
    again = load_student(saved, auto_class=setup.task.auto_class)
    examples = setup.for_student(again).validation
    batch = examples.collate(np.arange(min(PROBE, len(examples)), dtype=np.int64))
    batch.pop("labels", None)
    student.model.eval()
    with torch.no_grad():
        here, there = student.model(**batch).logits, again.model(**batch).logits
    if not bool(torch.isfinite(here).all()):
        raise StageError("the student gives logits that are not finite")
    if not torch.equal(here, there):
        raise StageError(f"saving and loading changes the logits by {float((here - there).abs().max()):.2e}")
    return again


def _shared(step: _Step, result: Student, work: Path) -> dict[str, Any]:
    """Metric and size of what all targets share, as plain float32; its latency is nobody's."""
    artifact = build(result, step.setup.task, step.setup.validation, work / "ledger")
    return {
        "shared": True,
        "metric": score(artifact.file, step.setup.task, step.setup.validation)["value"],
        "latency": {"kind": "unavailable", "reason": "the stage is the same for all targets"},
        "size_bytes": artifact.file.stat().st_size,
        "compressed_bytes": compressed_bytes(artifact.file),
        "precision": artifact.precision,
        "shape": result.arch.describe(),
    }


def _weighed(
    track: Track, step: _Step, before: Student, result: Student, saved: Student, ctx: Context
) -> dict[str, Any]:
    """Both sides of the stage, the guard's decision, and in front the figures of what goes on."""
    same = result.model is before.model and result.processor_dir == before.processor_dir
    if same and (result.quantization, result.sparsity) == (before.quantization, before.sparsity):
        return {"metric": None, "latency": {"kind": "unavailable", "reason": "the stage changes no weights"}}
    *sides, decision = guard(track.scale, step.stage, before, saved, ctx.work / "ledger", ctx.notes)
    made = {"before": sides[0].to_dict(), "after": sides[1].to_dict()}
    goes_on = made["before" if decision is not None and not decision.kept else "after"]
    figures = {key: goes_on.get(key) for key in FIGURES if key in goes_on or key not in RARE}
    return {**figures, **(decision.to_dict() if decision else {}), **made}


def plain(value: Any) -> Any:
    """Notes as plain data for JSON: numpy numbers, tuples and shapes unwrapped."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value.describe() if isinstance(value, Arch) else value
