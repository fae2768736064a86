"""Accuracy of searched and pruned students at measured speedups, without quantization, against simpler ways to cut.

    python bench/pruning.py                                   # digits, with a teacher made on the spot
    python bench/pruning.py TEACHER --data DIR --work FOLDER --speedups 2 3 4 6 8 12 --seeds 0 1 2

Four ways to the same predicted latency (the measured one is reported), each followed by the same operators and the
same distillation:

    edgekd        search chooses layers, heads and neurons; prune cuts by the default criterion
    every_other   whole layers only: as many as fit, evenly spaced, full width
    uniform       all layers, the same heads and neurons in each
    magnitude     the shape of `edgekd`, but what is kept goes by the magnitude of the weights

Shapes are chosen first, on a quiet machine, then students are trained (`--jobs` processes of one thread), then all are
measured in turns in one run with the teacher. Accuracy is that of the ONNX files on the test split, which no choice
looks at. What is finished stays in the work folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import digits_teacher, fingerprint, head, mean_and_deviation, one_thread, require_own_work, write
from common import surroundings as of_machine

FORMS = ("fp32", "fp32_fused", "fp32_lean")
ARMS = ("edgekd", "every_other", "uniform", "magnitude")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-pruning"))
    parser.add_argument("--speedups", type=float, nargs="+", default=[2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--phase", choices=("shapes", "train", "measure", "all"), default="all")
    parser.add_argument("--name", help="of the JSON in bench/results [default: pruning or pruning-digits]")
    options = parser.parse_args()
    options.name = options.name or ("pruning" if options.teacher else "pruning-digits")
    if options.teacher is None:
        options.teacher = digits_teacher(options.work / "teacher", options.data)
    own = {"teacher": fingerprint(options.teacher), "data": options.data, "epochs": options.epochs}
    require_own_work(options.work, own)
    if options.phase in ("shapes", "all"):
        choose_shapes(options)
    if options.phase in ("train", "all"):
        train_all(options)
    if options.phase in ("measure", "all"):
        report(options, measure_all(options))
    return 0


def surroundings(options: argparse.Namespace, speedup: float | None, seed: int, work: Path) -> tuple[Any, Any]:
    """Setup and context of one student: fp32, batch 1, 64 tokens, one thread."""
    from edgekd.context import Budget
    from edgekd.operators import Operators

    setup, context = of_machine(
        options.teacher, options.data, work, options.work / "cache",
        budget=Budget(speedup=speedup, batch=1, sequence=64, threads=1), lowering="fp32_lean", seed=seed,
        reshape=Operators().reshape,
    )  # fmt: skip
    return setup, replace(context, teacher_graph=teacher_graph(options, setup))


def teacher_graph(options: argparse.Namespace, setup: Any) -> Path:
    from edgekd.export.onnx import export_float

    file: Path = options.work / "teacher.onnx"
    return file if file.is_file() else export_float(setup.teacher, setup.task.name, file)


def choose_shapes(options: argparse.Namespace) -> None:
    """One shape for each speedup and arm, into `shapes.json`."""
    from edgekd.pipeline.stages import plain
    from edgekd.search import Search
    from edgekd.search.reference import find_reference

    file = options.work / "shapes.json"
    shapes: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for speedup in options.speedups:
        if f"edgekd-{speedup:g}" in shapes:
            continue
        setup, context = surroundings(options, speedup, 0, options.work / f"search-{speedup:g}")
        search, began = Search(), time.monotonic()
        planned = search.run(setup.teacher, context)
        shapes[f"edgekd-{speedup:g}"] = {"arch": planned.plan.to_dict(), "notes": plain(context.notes)}
        reference = find_reference(search, setup.teacher, context)
        predict = reference.predictor(context.reshape)
        limit = (1 - search.margin) * reference.teacher_ms / speedup
        for arm, arch in (
            ("every_other", evenly(setup.teacher.arch, limit, predict)),
            ("uniform", uniform(setup.teacher.arch, limit, predict)),
        ):
            shapes[f"{arm}-{speedup:g}"] = {"arch": arch and arch.to_dict()}
        print(speedup, planned.plan.describe(), f"{time.monotonic() - began:.0f} s", flush=True)
        file.write_text(json.dumps(shapes, indent=1))


def evenly(arch: Any, limit: float, predict: Any) -> Any:
    """As many evenly spaced layers of full width as fit, or None."""
    count = len(arch.layers)
    for depth in range(count - 1, 0, -1):
        kept = [round(i * count / depth) for i in range(depth)]
        shape = replace(arch, layers=tuple(arch.layers[i] for i in kept))
        if predict(shape) <= limit:
            return shape
    return None


def uniform(arch: Any, limit: float, predict: Any) -> Any:
    """All layers with the same share of heads and neurons, as wide as fits, or None."""
    heads, neurons = arch.layers[0].heads, arch.layers[0].neurons
    for step in range(neurons // 16, 0, -1):
        share = step * 16 / neurons
        layer = {"heads": max(round(heads * share), 1), "neurons": step * 16}
        shape = replace(arch, layers=tuple(replace(each, **layer) for each in arch.layers))
        if predict(shape) <= limit:
            return shape
    return None


def jobs_of(options: argparse.Namespace) -> list[tuple[str, float, int]]:
    shapes = json.loads((options.work / "shapes.json").read_text())
    return [
        (arm, speedup, seed)
        for seed in options.seeds
        for arm in options.arms
        for speedup in options.speedups
        if shapes[f"{'edgekd' if arm == 'magnitude' else arm}-{speedup:g}"]["arch"]
    ]


def train_all(options: argparse.Namespace) -> None:
    """Train what is not trained yet, the largest first, in processes of one thread."""
    left = [job for job in jobs_of(options) if not (folder_of(options, job) / "facts.json").is_file()]
    with multiprocessing.get_context("spawn").Pool(options.jobs, one_thread) as pool:
        for job, seconds in pool.imap_unordered(_train, [(options, job) for job in left]):
            print("trained", *job, f"{seconds:.0f} s", flush=True)


def folder_of(options: argparse.Namespace, job: tuple[str, float, int]) -> Path:
    arm, speedup, seed = job
    return Path(options.work / f"{arm}-{speedup:g}-{seed}")


def _train(task: tuple[argparse.Namespace, tuple[str, float, int]]) -> tuple[tuple[str, float, int], float]:
    from edgekd.arch import Arch
    from edgekd.distill import Distill
    from edgekd.operators import Operators
    from edgekd.pipeline.stages import plain
    from edgekd.prune import Prune

    options, job = task
    arm, speedup, seed = job
    folder = folder_of(options, job)
    shapes = json.loads((options.work / "shapes.json").read_text())
    plan = Arch.from_dict(shapes[f"{'edgekd' if arm == 'magnitude' else arm}-{speedup:g}"]["arch"])
    setup, context = surroundings(options, speedup, seed, folder / "work")
    began = time.monotonic()
    student = replace(setup.teacher, plan=plan)
    prune = Prune(criterion="magnitude", reconstruct=False) if arm == "magnitude" else Prune()
    # The operators are those that any student of this task takes; their own measured guard would time a busy machine.
    steps = (prune, Operators(force=True), Distill(epochs=options.epochs))
    for stage in steps:
        student = stage.run(student, context)
    seconds = time.monotonic() - began
    student.save(folder / "student")
    history = context.notes["training"]["history"]
    facts = {
        "seconds": seconds,
        "validation": max(each["metric"] for each in history),
        "shape": student.arch.describe(),
    }
    facts["distill"] = plain(asdict(steps[-1]))
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    return job, seconds


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Export every student, time all in turns with the teacher in one run, and score them on the test split."""
    from edgekd.latency.bench import Settings
    from edgekd.latency.stats import summarize
    from edgekd.pipeline.artifact import build, score, timed
    from edgekd.student import load_student

    setup, context = surroundings(options, None, 0, options.work / "measure")
    rows, timing = [], []
    for job in jobs_of(options):
        folder = folder_of(options, job)
        if not (folder / "facts.json").is_file():
            continue
        facts = json.loads((folder / "facts.json").read_text())
        student = load_student(folder / "student", auto_class=setup.task.auto_class)
        forms = {form: folder / form / "model.onnx" for form in FORMS}
        for form, file in forms.items():
            if not file.is_file():
                build(student, setup.task, setup.validation, file.parent, lowering=form)
        quality = score(forms["fp32"], setup.task, setup.test)
        arm, speedup, seed = job
        rows.append({"arm": arm, "speedup_asked": speedup, "seed": seed, **facts, "test": quality["value"]})
        timing.append(forms)
    groups: dict[tuple[str, float], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row["arm"], row["speedup_asked"]), []).append(i)
    # Latency does not depend on the weights: the first seed of each shape is timed, in all forms.
    firsts = [members[0] for members in groups.values()]
    files = [timing[i][form] for form in FORMS for i in firsts]
    teacher, *samples = timed(
        [teacher_graph(options, setup), *files], context.target, context.budget, Settings(blocks=200, max_seconds=600)
    )
    for place, members in enumerate(groups.values()):
        seen = min(
            (summarize(s, target="local", baseline=teacher) for s in samples[place :: len(groups)]),
            key=lambda m: m.p50_ms or np.inf,
        )
        for i in members:
            rows[i] |= {"p50_ms": seen.p50_ms, "speedup": seen.speedup, "speedup_ci99": seen.speedup_ci99}
    base = score(teacher_graph(options, setup), setup.task, setup.test)
    rows.insert(0, {"arm": "teacher", "p50_ms": float(np.median(teacher.ms)), "test": base["value"], "n": base["n"]})
    return rows


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    teacher = rows[0]["test"]
    table = []
    for arm in options.arms:
        for speedup in options.speedups:
            own = [row for row in rows if row["arm"] == arm and row.get("speedup_asked") == speedup]
            if own:
                tests = [row["test"] for row in own]
                mean, spread = mean_and_deviation(tests)
                table.append({
                    "arm": arm, "asked": speedup, "speedup": own[0]["speedup"], "test_mean": mean, "test_sd": spread,
                    "retained": mean / teacher, "seeds": len(own), "shape": own[0]["shape"],
                })  # fmt: skip
                print(f"{arm:12} {speedup:5g}x measured {own[0]['speedup']:.2f}x  test {mean:.4f} "
                      f"± {spread or 0:.4f}  retained {mean / teacher:.2%}  {own[0]['shape']}")  # fmt: skip
    write(options.name, {**head(), "epochs": options.epochs, "table": table, "rows": rows})


if __name__ == "__main__":
    raise SystemExit(main())
