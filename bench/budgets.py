"""Does search keep its word? Twenty latency budgets, and how the chosen shape does when it is measured again.

    taskset -c 1 python bench/budgets.py                          # a random MiniLM-sized BERT and made-up texts
    taskset -c 1 python bench/budgets.py TEACHER --data DIR

Search alone runs, without short distillations: what is asked here is whether the shape it chooses is within its budget,
and not needlessly far below. Budgets are speedups from 1.5 to 12 over the teacher, every fourth given as a p95 in
milliseconds instead, half of the students in float32 and half in int8, with the operators that a whole run puts in.
Every choice is built again and measured
in turns with the teacher, in a new process and for longer than search does. A budget is met if the measured share
of it is at most 1, as medians (speedup) or p95 say; the ends of the intervals are reported beside it. Where the whole
teacher in its new form is within the budget, nothing is cut, and less than 90 % may be used (`whole_teacher`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import head

from edgekd.calibrate.bodies import bert, body_of_student
from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec
from edgekd.errors import BudgetError
from edgekd.export.onnx import export_float
from edgekd.files import write_json
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import summarize
from edgekd.operators import Operators
from edgekd.pipeline.setup import prepare
from edgekd.search import Search
from edgekd.search.timing import build_graph, frame_for
from edgekd.student import Student, load_student, read_config
from edgekd.target import load_target, probe
from edgekd.tasks import get_task, infer_task

FEWEST, MOST = 1.5, 12.0
SAMPLES = 32
AGAIN = Settings(blocks=200, min_runs=400, max_seconds=60.0, seed=99)


class Tokens:
    """Made-up texts as the model takes them: what search scores does not matter here, but how long they are."""

    def __init__(self, count: int, longest: int, vocabulary: int, names: tuple[str, ...]) -> None:
        generator = np.random.default_rng(0)
        self.names = names
        self.lengths = generator.integers(longest // 8, longest, count, dtype=np.int64)
        self.labels = np.arange(count, dtype=np.int64) % 2
        self.ids = generator.integers(5, vocabulary, (count, longest))
        self.fingerprint = f"made up {count} {longest} {vocabulary}"

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Any) -> Tokens:
        part = object.__new__(Tokens)
        part.names, part.fingerprint = self.names, self.fingerprint
        part.lengths, part.labels, part.ids = self.lengths[indices], self.labels[indices], self.ids[indices]
        return part

    def collate(self, indices: Any, length: int | None = None) -> dict[str, Any]:
        import torch

        own = torch.from_numpy(self.lengths[indices])
        mask = (torch.arange(length or int(own.max())) < own[:, None]).long()
        ids = torch.from_numpy(self.ids[indices])[:, : mask.shape[1]] * mask
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {name: inputs[name] for name in self.names} | {"labels": torch.from_numpy(self.labels[indices])}


def main() -> None:
    """Search for every budget, measure every choice, write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "teacher", type=Path, nargs="?", help="a text model's folder [default: a random MiniLM-sized BERT]"
    )
    parser.add_argument("--data", help="what `edgekd compress --data` takes [default: made-up texts]")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the budgets to try [default: all]")
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON [default: budgets.json or budgets-random.json in bench/results]")
    arguments = parser.parse_args()
    name = "budgets.json" if arguments.teacher else "budgets-random.json"
    arguments.out = arguments.out or Path(__file__).parent / "results" / name
    teacher, task_name = _teacher(arguments.teacher)
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as name:
        folder = Path(name)
        base = _context(teacher, task_name, arguments, folder)
        teacher_ms = _teacher_ms(base)
        rows = []
        for number, (budget, lowering) in enumerate(budgets(arguments.count, teacher_ms, arguments)):
            if arguments.only and number not in arguments.only:
                continue
            work = folder / str(number)
            work.mkdir()
            ctx = replace(base, budget=budget, lowering=lowering, work=work, notes={})
            rows.append({"number": number, **_tried(ctx)})
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "checks"}), flush=True)
            _write(arguments, teacher, rows)


def budgets(count: int, teacher_ms: float, arguments: argparse.Namespace) -> list[tuple[Budget, str]]:
    """Budgets and forms: speedups on a logarithmic scale, every fourth one as milliseconds, forms in turns."""
    found = []
    for i, speedup in enumerate(np.geomspace(FEWEST, MOST, count)):
        own = {"batch": 1, "sequence": arguments.sequence, "threads": arguments.threads}
        asked = {"latency_p95_ms": float(teacher_ms / speedup)} if i % 4 == 3 else {"speedup": float(speedup)}
        found.append((Budget(**asked, **own), "fp32_lean" if i % 2 else "int8_dynamic_lean"))
    return found


def _teacher(folder: Path | None) -> tuple[Student, str]:
    if folder is None:
        return bert(384, 12, depth=6).student, "text-classification"
    task = get_task(infer_task(read_config(folder)))
    return load_student(folder, auto_class=task.auto_class), task.name


def _context(teacher: Student, task_name: str, arguments: argparse.Namespace, folder: Path) -> Context:
    task = get_task(task_name)
    config = teacher.model.config
    names = ("input_ids", "attention_mask", "token_type_ids")
    names = names if getattr(config, "type_vocab_size", 0) > 1 else names[:2]
    train: Any = Tokens(SAMPLES, arguments.sequence, int(config.vocab_size), names)
    if arguments.data is not None:
        train = prepare(arguments.teacher, DataSpec(path=arguments.data), progress=Silent()).train
    return Context(
        teacher=teacher, task=task, processor=None, train=train, validation=train, test=None,
        target=probe(load_target("local")), budget=Budget(sequence=arguments.sequence, threads=arguments.threads),
        work=folder, cache=folder / "cache", progress=Silent(), reshape=Operators().reshape,
        teacher_graph=export_float(body_of_student(teacher, task_name).student, task_name, folder / "teacher.onnx"),
    )  # fmt: skip


def _measured(ctx: Context, subjects: list[Subject], settings: Settings) -> Any:
    budget = ctx.budget
    return measure(
        subjects, target=ctx.target, batch=budget.batch, sequence=budget.sequence, threads=budget.threads,
        settings=settings,
    )  # fmt: skip


def _teacher_ms(ctx: Context) -> float:
    assert ctx.teacher_graph is not None
    (samples,) = _measured(ctx, [Subject(name="teacher", path=ctx.teacher_graph)], Settings(blocks=60))
    return float(np.percentile(samples.ms, 95))


def _tried(ctx: Context) -> dict[str, Any]:
    """Search once, then build and measure the choice again."""
    budget = ctx.budget
    asked = {"speedup": budget.speedup, "latency_p95_ms": budget.latency_p95_ms, "lowering": ctx.lowering}
    began = time.monotonic()
    try:
        plan = Search(samples=SAMPLES, finalists=0).run(ctx.teacher, ctx).plan
    except BudgetError as error:
        return {**asked, "error": str(error), "seconds": round(time.monotonic() - began, 1)}
    seconds = round(time.monotonic() - began, 1)
    assert plan is not None
    assert ctx.teacher_graph is not None
    body = body_of_student(ctx.teacher, ctx.task.name)
    file = build_graph(body, ctx.reshape(plan), frame_for(body, ctx), ctx, ctx.work / "again.onnx")
    subjects = [Subject(name="teacher", path=ctx.teacher_graph), Subject(name="student", path=file)]
    teacher, sample = _measured(ctx, subjects, AGAIN)
    seen = summarize(sample, target=ctx.target.name, baseline=teacher)
    assert seen.speedup is not None
    if budget.speedup is not None:
        used = budget.speedup / seen.speedup
        ends = [budget.speedup / end for end in reversed(seen.speedup_ci99 or (seen.speedup, seen.speedup))]
    else:
        assert budget.latency_p95_ms is not None
        used = float(seen.p95_ms or 0.0) / budget.latency_p95_ms
        ends = [end / budget.latency_p95_ms for end in seen.p95_ci99_ms or (seen.p95_ms, seen.p95_ms)]
    return {
        **asked, "shape": plan.describe(), "whole": plan == ctx.teacher.arch, "used": used,
        "used_ci99": [end if np.isfinite(end) else None for end in ends],
        "under": used <= 1.0, "within_10": 0.9 <= used <= 1.0, "predicted_ms": ctx.notes["predicted_ms"],
        "p50_ms": seen.p50_ms, "p95_ms": seen.p95_ms, "speedup_measured": seen.speedup, "seconds": seconds,
        "checks": ctx.notes["checks"],
    }  # fmt: skip


def _write(arguments: argparse.Namespace, teacher: Student, rows: list[dict[str, Any]]) -> None:
    chosen = [row for row in rows if "used" in row]
    facts = {
        **head(),
        "teacher": arguments.teacher.name if arguments.teacher else "random BERT",
        "data": Path(arguments.data).name if arguments.data else "made up", "shape": teacher.arch.describe(),
        "sequence": arguments.sequence, "threads": arguments.threads, "tried": len(rows), "chosen": len(chosen),
        "under": sum(row["under"] for row in chosen), "within_10": sum(row["within_10"] for row in chosen),
        "whole_teacher": sum(row["whole"] for row in chosen), "rows": rows,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, facts)


if __name__ == "__main__":
    main()
