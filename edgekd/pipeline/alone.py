"""One stage by itself: a model folder in, a model folder out."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.context import Budget, Context, Progress, as_it_is
from edgekd.data import DataSpec
from edgekd.distill.processes import this_process
from edgekd.errors import ModelError, StoreError
from edgekd.files import explained, publish, write_json
from edgekd.operators import Operators
from edgekd.pipeline.artifact import build
from edgekd.pipeline.setup import Setup, fitted, prepare, same_tokenizer
from edgekd.pipeline.stages import check_promises, plain, take_along
from edgekd.stages import STAGES, Stage
from edgekd.student import Student, load_student
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
    lowering: str = "fp32_fused"
    max_length: int | None = None
    seed: int = 0
    operators: Operators | None = None
    """Settings of an operators stage to come, which the stage has to foresee."""


def run_alone(name: str, stage: Stage, asked: Alone, out: str | Path, progress: Progress) -> dict[str, Any]:
    """Run one stage and publish the student folder atomically; returns what the stage noted.

    Raises:
        StoreError: `out` exists and is not the output of such a command.
        ModelError: the stage compares the model with a teacher that has another tokenizer.
        EdgekdError: as the stage raises it.
    """
    final = Path(out)
    if final.exists() and not (final.is_dir() and (not any(final.iterdir()) or (final / RECORD).is_file())):
        raise StoreError(f"will not replace {final}: it was not made by an edgekd stage; choose another --out")
    setup = prepare(asked.teacher or asked.model, asked.data, max_length=asked.max_length, progress=progress)
    setup = fitted(setup, asked.target, asked.budget)
    student = load_student(asked.model, auto_class=setup.task.auto_class)
    if not same_tokenizer(setup.teacher, student) and list(STAGES).index(name) < list(STAGES).index("vocabulary"):
        raise ModelError(
            f"{asked.model} reads texts with another tokenizer than {asked.teacher}, and {name} compares the two token "
            f"by token: run {name} before vocabulary"
        )
    work = final.parent / f".{final.name}.work"
    with explained("write", work):
        work.mkdir(parents=True, exist_ok=True)
    context = _context(setup.for_student(student), asked, work, progress, needs_graph=name == "search")
    result = stage.run(student, context)
    record = {"stage": name, "shape": result.arch.describe(), "details": plain(context.notes)}
    if this_process().main:
        _publish(result, record, final, setup, work)
        shutil.rmtree(work)
    return {"out": str(final), **record}


def _publish(result: Student, record: dict[str, Any], final: Path, setup: Setup, work: Path) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.draft-", dir=final.parent))
    result.save(draft)
    check_promises(result, draft, setup)
    take_along(work, draft)
    write_json(draft / RECORD, record)
    publish(draft, final, marker=RECORD)


def _context(setup: Setup, asked: Alone, work: Path, progress: Progress, *, needs_graph: bool) -> Context:
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
        reshape=as_it_is if asked.operators is None else asked.operators.reshape,
    )
