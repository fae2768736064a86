"""What each stage and each loss is worth: one shape, and in turn each part left out or changed.

    python bench/ablation.py                                       # digits, with a teacher made on the spot
    python bench/ablation.py TEACHER --data DIR --work FOLDER --speedup 8 --seeds 0 1 2

The whole chain is search, prune, operators, distill, vocabulary, quantize. Search runs once, for the asked speedup as
int8; every arm but `no search` and `full operators` has the shape that it chose. Students are trained in `--jobs`
processes of one thread, then all files are timed in turns with the teacher in one run. Accuracy is that of the files on
the test split, which no choice looks at. What is finished stays in the work folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import digits_teacher, fingerprint, head, mean_and_deviation, one_thread, require_own_work, write
from common import surroundings as of_machine
from pruning import teacher_graph, uniform

INTEGER, FLOAT = "int8_dynamic_lean", "fp32_lean"
KL: dict[str, Any] = {"forward_kl": {"weight": 1.0, "temperature": 2.0}}
HIDDEN = {"hidden_mse": 1.0}


@dataclass(frozen=True)
class Arm:
    """Settings of stages (None leaves a stage out), the shape, and whose weights are taken if none are trained."""

    stages: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    shape: str = "searched"
    weights_of: str | None = None
    form: str = INTEGER


ARMS: dict[str, Arm] = {
    "whole chain": Arm(),
    "no search": Arm(shape="uniform"),
    "full operators": Arm(shape="plain", stages={"operators": None}),
    "prune by magnitude": Arm({"prune": {"criterion": "magnitude", "reconstruct": False}}),
    "no distillation": Arm({"distill": None}),
    "labels alone": Arm({"distill": {"losses": {"cross_entropy": 1.0}}}),
    "KL alone": Arm({"distill": {"losses": KL}}),
    "hidden states alone": Arm({"distill": {"losses": HIDDEN}}),
    "KL, hidden states and labels": Arm({"distill": {"losses": {**KL, **HIDDEN, "cross_entropy": 1.0}}}),
    "noisy copies": Arm({"distill": {"copies": 4}}),
    "whole vocabulary": Arm({"vocabulary": None}, weights_of="whole chain"),
    "no quantization": Arm(weights_of="whole chain", form=FLOAT),
}
STAGES = ("prune", "operators", "distill")
"""Those that run before the weights are kept; the others take them as they are."""
Job = tuple[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-ablation"))
    parser.add_argument("--speedup", type=float, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--phase", choices=("shapes", "train", "measure", "all"), default="all")
    parser.add_argument("--name", default="ablation")
    options = parser.parse_args()
    if options.teacher is None:
        options.teacher = digits_teacher(options.work / "teacher", options.data)
    own = {"data": options.data, "speedup": options.speedup, "epochs": options.epochs}
    require_own_work(options.work, {"teacher": fingerprint(options.teacher), **own})
    if options.phase in ("shapes", "all"):
        choose_shapes(options)
    if options.phase in ("train", "all"):
        train_all(options)
    if options.phase in ("measure", "all"):
        report(options, *measure_all(options))
    return 0


def surroundings(options: argparse.Namespace, seed: int, work: Path) -> tuple[Any, Any]:
    from edgekd.context import Budget
    from edgekd.operators import Operators

    budget = Budget(speedup=options.speedup, batch=1, sequence=64, threads=1)
    setup, context = of_machine(
        options.teacher, options.data, work, options.work / "cache",
        budget=budget, lowering=INTEGER, seed=seed, reshape=Operators().reshape,
    )  # fmt: skip
    return setup, replace(context, teacher_graph=teacher_graph(options, setup))


def choose_shapes(options: argparse.Namespace) -> None:
    """What search finds, the same without changed operators, and one of equal layers as fast by prediction."""
    from edgekd.pipeline.stages import plain as unwrap
    from edgekd.search import Search
    from edgekd.search.reference import find_reference
    from edgekd.search.variants import plain

    if (options.work / "shapes.json").is_file():
        return
    setup, context = surroundings(options, 0, options.work / "search")
    search, began = Search(), time.monotonic()
    chosen = search.run(setup.teacher, context).plan
    predict = find_reference(search, setup.teacher, context).predictor(context.reshape)
    equal = uniform(setup.teacher.arch, predict(chosen), predict)
    shapes = {"searched": chosen, "plain": plain(chosen), "uniform": equal}
    facts = {name: shape and shape.to_dict() for name, shape in shapes.items()}
    facts |= {"seconds": time.monotonic() - began, "notes": unwrap(context.notes)}
    (options.work / "shapes.json").write_text(json.dumps(facts, indent=1))
    print(chosen.describe(), f"{facts['seconds']:.0f} s", flush=True)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    shapes = json.loads((options.work / "shapes.json").read_text())
    return [(arm, seed) for seed in options.seeds for arm in options.arms if shapes[ARMS[arm].shape]]


def folder_of(options: argparse.Namespace, job: Job) -> Path:
    return Path(options.work / f"{(ARMS[job[0]].weights_of or job[0]).replace(' ', '-')}-{job[1]}")


def train_all(options: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    wanted = dict.fromkeys((ARMS[arm].weights_of or arm, seed) for arm, seed in jobs_of(options))
    left = [job for job in wanted if not (folder_of(options, job) / "facts.json").is_file()]
    with multiprocessing.get_context("spawn").Pool(options.jobs, one_thread) as pool:
        for job, facts in pool.imap_unordered(_train, [(options, job) for job in left]):
            print("trained", *job, f"validation {facts['validation']:.4f}  {facts['seconds']:.0f} s", flush=True)


def _train(task: tuple[argparse.Namespace, Job]) -> tuple[Job, dict[str, Any]]:
    from edgekd.arch import Arch
    from edgekd.distill.teachers import predict
    from edgekd.stages import build_stage

    options, job = task
    arm, folder = ARMS[job[0]], folder_of(options, job)
    shapes = json.loads((options.work / "shapes.json").read_text())
    setup, context = surroundings(options, job[1], folder / "work")
    began, student = time.monotonic(), replace(setup.teacher, plan=Arch.from_dict(shapes[arm.shape]))
    # The operators are those that any student of this task takes; their own measured guard would time a busy machine.
    usual = {"prune": {}, "operators": {"force": True}, "distill": {"epochs": options.epochs}}
    for name in STAGES:
        changed = arm.stages.get(name, {})
        if changed is not None:
            student = build_stage(name, {**usual[name], **changed}).run(student, context)
    seconds = time.monotonic() - began
    student.save(folder / "student")
    found = predict(student.model, context.validation)
    facts = {
        "seconds": seconds, "shape": student.arch.describe(),
        "validation": context.task.score(found, context.validation.labels),
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    return job, facts


def finished(options: argparse.Namespace, job: Job, setup: Any, context: Any) -> Path:
    """The file of an arm, with the stages that need no training."""
    from edgekd.pipeline.artifact import build
    from edgekd.stages import build_stage
    from edgekd.student import load_student

    arm, folder = ARMS[job[0]], options.work / "files" / f"{job[0].replace(' ', '-')}-{job[1]}"
    if not (folder / "model.onnx").is_file():
        student = load_student(folder_of(options, job) / "student", auto_class=setup.task.auto_class)
        examples = setup
        if setup.task.kind == "text" and arm.stages.get("vocabulary", {}) is not None:
            student = build_stage("vocabulary", {}).run(student, context)
            examples = setup.for_student(student)
        build(student, setup.task, examples.validation, folder, lowering=arm.form, gate=False)
        quality = score_of(folder / "model.onnx", examples)
        (folder / "test.json").write_text(json.dumps(quality))
    return folder / "model.onnx"


def score_of(file: Path, setup: Any) -> dict[str, Any]:
    from edgekd.pipeline.artifact import score

    return score(file, setup.task, setup.test or setup.validation)


def measure_all(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The teacher, and every student: timed in turns in one run (the first seed of each arm), scored on the test."""
    from edgekd.latency.bench import Settings
    from edgekd.latency.stats import summarize
    from edgekd.pipeline.artifact import timed

    setup, context = surroundings(options, 0, options.work / "measure")
    done = [job for job in jobs_of(options) if (folder_of(options, job) / "facts.json").is_file()]
    files = {job: finished(options, job, setup, context) for job in done}
    firsts = {arm: next(job for job in done if job[0] == arm) for arm in dict.fromkeys(arm for arm, _ in done)}
    graph = teacher_graph(options, setup)
    teacher, *samples = timed(
        [graph, *(files[job] for job in firsts.values())], context.target, context.budget,
        Settings(blocks=200, max_seconds=600),
    )  # fmt: skip
    seen = {arm: summarize(s, target="local", baseline=teacher) for arm, s in zip(firsts, samples, strict=True)}
    rows = []
    for job in done:
        latency, facts = seen[job[0]], json.loads((folder_of(options, job) / "facts.json").read_text())
        quality = json.loads((files[job].parent / "test.json").read_text())
        rows.append({
            "arm": job[0], "seed": job[1], **facts, "test": quality["value"], "p50_ms": latency.p50_ms,
            "speedup": latency.speedup, "speedup_ci99": latency.speedup_ci99,
            "size_mb": files[job].stat().st_size / 1e6,
        })  # fmt: skip
    base = score_of(graph, setup)
    return {"test": base["value"], "n": base["n"], "p50_ms": float(np.median(teacher.ms))}, rows


def report(options: argparse.Namespace, teacher: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    table = []
    for arm in options.arms:
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        mean, deviation = mean_and_deviation([row["test"] for row in own])
        first = own[0]
        table.append({
            "arm": arm, "seeds": len(own), "test_mean": mean, "test_sd": deviation, "retained": mean / teacher["test"],
            **{key: first[key] for key in ("speedup", "speedup_ci99", "p50_ms", "size_mb", "shape")},
        })  # fmt: skip
        print(f"{arm:30} test {mean:.4f} ± {deviation or 0:.4f}  {first['speedup']:.2f}x  {first['size_mb']:.1f} MB")
    write(options.name, {**head(), "epochs": options.epochs, "teacher": teacher, "table": table, "rows": rows})


if __name__ == "__main__":
    raise SystemExit(main())
