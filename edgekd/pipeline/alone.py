"""One stage by itself: a model folder in, a model folder out."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.context import Budget, Context, Progress, as_it_is
from edgekd.data import DataSpec
from edgekd.distill.processes import this_process
from edgekd.errors import EdgekdError, ModelError
from edgekd.files import explained, publish, require_place, sha256_folder, sha256_json, write_json
from edgekd.operators import Operators
from edgekd.pipeline.artifact import build
from edgekd.pipeline.keys import FORESEES, contents, settings_of
from edgekd.pipeline.setup import Setup, fitted, prepare
from edgekd.pipeline.stages import check_promises, plain, take_along, without_lost_promises
from edgekd.stages import STAGES, Stage
from edgekd.student import Student, load_student, local_folder
from edgekd.target import Target

RECORD = "edgekd-stage.json"


@dataclass(frozen=True, kw_only=True)
class Alone:
    """A stage's surroundings when it runs without a pipeline. `teacher` None: the model itself is the teacher."""

    model: str
    teacher: str | None
    data: DataSpec
    target: Target
    budget: Budget
    lowering: str = "fp32_lean"
    max_length: int | None = None
    seed: int = 0
    operators: Operators | None = None
    """Settings of an operators stage to come, which search foresees."""


def run_alone(name: str, stage: Stage, asked: Alone, out: str | Path, progress: Progress) -> dict[str, Any]:
    """Run one stage and publish the student folder atomically; returns what the stage noted.

    Raises:
        StoreError: `out` exists and is not the output of such a command, or cannot be written.
        ModelError: the stage compares the model with a teacher that reads the texts as other tokens.
        EdgekdError: as the stage raises it.
    """
    final = Path(out)
    require_place(final, marker=RECORD, why="it was not made by an edgekd stage")
    setup = prepare(asked.teacher or asked.model, asked.data, max_length=asked.max_length, progress=progress)
    setup = fitted(setup, asked.target, asked.budget)
    student = load_student(asked.model, auto_class=setup.task.auto_class)
    own = setup.for_student(student)
    _require_same_tokens(name, own, setup, asked)
    work = final.parent / f".{final.name}.work-{_key(name, stage, asked, setup)[:16]}"
    with explained("write", work):
        work.mkdir(parents=True, exist_ok=True)
    if (final / RECORD).is_file():
        progress.say(f"{final} has an earlier result, which this one will replace")
    try:
        context = _context(name, own, asked, work, progress)
        result = without_lost_promises(stage.run(student, context), progress)
    except EdgekdError:
        # Only what a kill has left is taken up again: after a refusal something has to be changed.
        shutil.rmtree(work, ignore_errors=True)
        raise
    record = {"stage": name, "shape": result.arch.describe(), "details": plain(context.notes)}
    if this_process().main:
        _publish(result, record, final, setup, work)
        shutil.rmtree(work)
    return {"out": str(final), **record}


def _require_same_tokens(name: str, own: Setup, setup: Setup, asked: Alone) -> None:
    """Refuse a stage before `vocabulary` whose student is fed other tokens than its teacher."""
    before = list(STAGES).index(name) < list(STAGES).index("vocabulary")
    if setup.task.kind != "text" or not before or own.train.fingerprint == setup.train.fingerprint:
        return
    raise ModelError(
        f"{asked.model} reads the texts as other tokens than {asked.teacher}, and {name} compares the two token by "
        f"token: give a teacher with the same tokenizer (what `edgekd vocabulary` makes has its own, so {name} comes "
        "before it)"
    )


def _key(name: str, stage: Stage, asked: Alone, setup: Setup) -> str:
    """Hash over all that goes into the stage: scratch of a killed command is taken up by the same command alone."""
    model = setup.key["teacher"] if asked.teacher is None else sha256_folder(local_folder(asked.model))
    settings = [settings_of(stage), None if asked.operators is None else settings_of(asked.operators)]
    place = [asked.target.fingerprint, asdict(asked.budget), asked.lowering, asked.seed]
    return sha256_json([name, settings, contents(stage), model, dict(setup.key), place])


def _publish(result: Student, record: dict[str, Any], final: Path, setup: Setup, work: Path) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.draft-", dir=final.parent))
    result.save(draft)
    check_promises(result, draft, setup)
    take_along(work, draft)
    write_json(draft / RECORD, record)
    publish(draft, final, marker=RECORD)


def _context(name: str, setup: Setup, asked: Alone, work: Path, progress: Progress) -> Context:
    needs_graph, foreseen = name == "search", asked.operators if name in FORESEES else None
    graph = build(setup.teacher, setup.task, setup.validation, work / "teacher").file if needs_graph else None
    return Context(
        teacher=setup.teacher,
        task=setup.task,
        processor=setup.processor,
        train=setup.train,
        validation=setup.validation,
        test=None,
        target=asked.target,
        budget=asked.budget,
        work=work,
        cache=work / "cache",
        progress=progress,
        teacher_graph=graph,
        lowering=asked.lowering,
        seed=asked.seed,
        reshape=as_it_is if foreseen is None else foreseen.possible(setup.teacher).reshape,
    )
