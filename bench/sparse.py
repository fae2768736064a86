"""Accuracy and bytes of sparse students, by pattern and by loss, and what a target's guard says of them.

    python bench/sparse.py                                    # digits, with a teacher made on the spot
    python bench/sparse.py TEACHER --data DIR --work FOLDER --seeds 0 1 2
    python bench/sparse.py TEACHER --data DIR --work FOLDER --phase targets --targets local npu-ethos-u55-256

The teacher (or the student folder that takes its place) is made sparse and trained by the stage `sparsify` with its
defaults but for what an arm changes:

    patterns  unstructured-50, unstructured-75, unstructured-90, 2:4, 4x1-75, …: pattern and percent of zeros;
              with `-int8` at the end the training is under 8-bit rounding of weights and activations
    losses    squarehead (the stage's own: SquareHead, KL), squarehead_labels (labels too), kl (alone), plain (labels
              alone)

Students are trained in `--jobs` processes of one thread. Accuracy is that of the ONNX files, float and int8 with
dynamic ranges, on the test split, which no choice looks at; bytes are those of the whole file, of ONNX's sparse
initializers, and after deflate. `targets` asks the guard of each target about the students of the first seed. What
is finished stays in the work folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, digits_teacher, fingerprint, head, mean_and_deviation, one_thread, require_own_work, write
from common import surroundings as of_machine

PATTERNS = ("unstructured-50", "unstructured-75", "unstructured-90", "2:4", "4x1-75", "2:4-int8")
LOSSES: dict[str, dict[str, Any]] = {
    "squarehead": {},
    "squarehead_labels": {
        "losses": {"cross_entropy": 1.0, "squarehead": 1.0, "forward_kl": {"weight": 1.0, "temperature": 2.0}}
    },
    "kl": {"losses": {"forward_kl": {"weight": 1.0, "temperature": 2.0}}},
    "plain": {"losses": {"cross_entropy": 1.0}},
}
FORMS = ("fp32", "int8_dynamic")
Job = tuple[str, str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-sparse"))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), metavar="PATTERN[-PERCENT][-int8]")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=["local"])
    parser.add_argument("--phase", choices=("train", "measure", "targets", "all"), default="all")
    parser.add_argument("--name", default="sparse")
    options = parser.parse_args()
    if options.teacher is None:
        options.teacher = digits_teacher(options.work / "teacher", options.data)
    own = {"data": options.data, "epochs": options.epochs, "settings": options.settings}
    require_own_work(options.work, {"teacher": fingerprint(options.teacher), **own})
    if options.phase in ("train", "all"):
        train_all(options)
    if options.phase in ("measure", "all"):
        put(options, "rows", measure_all(options))
    if options.phase in ("targets", "all"):
        put(options, "guard", ask_guards(options))
    return 0


def surroundings(options: argparse.Namespace, seed: int, work: Path, target: str = "local") -> tuple[Any, Any]:
    """Setup and context of one student: batch 1, 64 tokens, one thread."""
    from edgekd.target import load_target, probe

    cache = options.work / "cache"
    return of_machine(options.teacher, options.data, work, cache, target=probe(load_target(target)), seed=seed)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    return [(p, loss, seed) for seed in options.seeds for p in options.patterns for loss in options.losses]


def folder_of(options: argparse.Namespace, job: Job) -> Path:
    pattern, loss, seed = job
    return Path(options.work / f"{pattern.replace(':', 'of')}-{loss}-{seed}")


def stage_of(options: argparse.Namespace, job: Job) -> Any:
    """The stage of an arm."""
    from edgekd.cli.common import parse_settings
    from edgekd.stages import build_stage

    name, *rest = job[0].removesuffix("-int8").split("-")
    share = {"sparsity": int(rest[0]) / 100} if rest else {}
    given = parse_settings(tuple(options.settings))
    return build_stage("sparsify", {"pattern": name, "epochs": options.epochs, **share, **LOSSES[job[1]], **given})


def train_all(options: argparse.Namespace) -> None:
    """Train what is not trained yet, in processes of one thread."""
    left = [job for job in jobs_of(options) if not (folder_of(options, job) / "facts.json").is_file()]
    with multiprocessing.get_context("spawn").Pool(options.jobs, one_thread) as pool:
        for job, seconds in pool.imap_unordered(_train, [(options, job) for job in left]):
            print("trained", *job, f"{seconds:.0f} s", flush=True)


def _train(task: tuple[argparse.Namespace, Job]) -> tuple[Job, float]:
    from edgekd.pipeline.stages import plain
    from edgekd.quantize.fake import Scheme

    options, job = task
    folder = folder_of(options, job)
    setup, context = surroundings(options, job[2], folder / "work")
    began, student = time.monotonic(), setup.teacher
    if job[0].endswith("-int8"):
        student = replace(student, quantization={"lowering": "int8_dynamic", "scheme": Scheme().to_dict()})
    made = stage_of(options, job).run(student, context)
    seconds = time.monotonic() - began
    made.save(folder / "student")
    facts = {"seconds": seconds, **plain(context.notes["sparsity"])}
    facts.pop("layers")
    facts["history"] = plain(context.notes.get("training", {}).get("history", []))
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    return job, seconds


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Test accuracy and bytes of the dense teacher and of every student, as float and as int8."""
    from edgekd.student import load_student

    setup, _ = surroundings(options, 0, options.work / "measure")
    rows = [{"pattern": "dense", **measured(setup, setup.teacher, options.work / "measure")}]
    for job in jobs_of(options):
        folder = folder_of(options, job)
        if not (folder / "facts.json").is_file():
            continue
        if not (folder / "measured.json").is_file():
            student = load_student(folder / "student", auto_class=setup.task.auto_class)
            (folder / "measured.json").write_text(json.dumps(measured(setup, student, folder)))
        facts = json.loads((folder / "facts.json").read_text())
        own = json.loads((folder / "measured.json").read_text())
        rows.append({**facts, **own, "pattern": job[0], "losses": job[1], "seed": job[2]})
    return rows


def measured(setup: Any, student: Any, folder: Path) -> dict[str, Any]:
    """Both forms of a student: accuracy on the test split, and bytes."""
    from edgekd.export.sparse import compressed_bytes, sparse_initializers
    from edgekd.pipeline.artifact import build, score

    found = {}
    for form in FORMS:
        file = build(student, setup.task, setup.validation, folder / form, lowering=form, gate=False).file
        sparse_initializers(file, folder / "sparse.onnx")
        found[form] = {
            "test": score(file, setup.task, setup.test or setup.validation)["value"],
            "bytes": file.stat().st_size,
            "coordinates_bytes": (folder / "sparse.onnx").stat().st_size,
            "deflate_bytes": compressed_bytes(file),
        }
        (folder / "sparse.onnx").unlink()
        file.unlink()
    return found


def ask_guards(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the guard of each target says of every pattern, from the first seed and loss."""
    from edgekd.export.onnx import export_float
    from edgekd.pipeline.guard import guard
    from edgekd.pipeline.sides import Scale
    from edgekd.student import load_student

    said = []
    for name in options.targets:
        setup, context = surroundings(options, 0, options.work / "guard", name)
        if context.target.is_static:
            setup = replace(setup, validation=setup.validation.take(np.arange(min(200, len(setup.validation)))))
        graph = export_float(setup.teacher, setup.task.name, options.work / "teacher.onnx")
        known: dict[str, Any] = {}
        scale = Scale(
            setup=setup, target=context.target, budget=context.budget, teacher_graph=graph, known=known
        )  # fmt: skip
        form = next(form for form in context.target.forms if form.startswith("int8"))
        for pattern in options.patterns:
            job = (pattern, options.losses[0], options.seeds[0])
            if not (folder_of(options, job) / "student").is_dir():
                continue
            sparse = load_student(folder_of(options, job) / "student", auto_class=setup.task.auto_class)
            # Both with 16-bit norms where the form knows them, as quantize decides once for dense and sparse alike.
            wide = {"wide": True} if form.endswith("tflite") else {}
            pair = [replace(each, quantization={"lowering": form, "calibration": 128, "seed": 0, **wide})
                    for each in (setup.teacher, sparse)]  # fmt: skip
            work = options.work / "guard" / f"{name}-{folder_of(options, job).name}"
            before, after, decision = guard(scale, stage_of(options, job), *pair, work)
            entry = {"target": name, "pattern": pattern, "before": before.to_dict(), "after": after.to_dict()}
            said.append({**entry, **(decision.to_dict() if decision else {})})
            print(name, pattern, "kept" if decision and decision.kept else "dropped", decision and decision.why)
    return said


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and points lost and times smaller against the dense float teacher."""
    dense, table = rows[0], []
    arms = dict.fromkeys((row["pattern"], row["losses"]) for row in rows[1:])
    for pattern, losses in arms:
        own = [row for row in rows[1:] if (row["pattern"], row["losses"]) == (pattern, losses)]
        entry: dict[str, Any] = {"pattern": pattern, "losses": losses, "seeds": len(own), "zeros": own[0]["sparsity"]}
        for form in FORMS:
            mean, spread = mean_and_deviation([row[form]["test"] for row in own])
            entry[form] = {
                "test_mean": mean,
                "test_sd": spread,
                "points": 100 * (mean - dense["fp32"]["test"]),
                "times_smaller": dense["fp32"]["bytes"] / float(np.mean([row[form]["deflate_bytes"] for row in own])),
            }
        table.append(entry)
        print(f"{pattern:18} {losses:11} " + "  ".join(
            f"{form} {entry[form]['test_mean']:.4f} ± {entry[form]['test_sd'] or 0:.4f} ({entry[form]['points']:+.2f}) "
            f"{entry[form]['times_smaller']:.1f}x" for form in FORMS))  # fmt: skip
    return table


def put(options: argparse.Namespace, key: str, found: list[dict[str, Any]]) -> None:
    """Put what was found into the results, beside what other phases found."""
    file = RESULTS / f"{options.name}.json"
    facts = json.loads(file.read_text()) if file.is_file() else {}
    facts |= {**head(), "epochs": options.epochs, key: found}
    if key == "rows":
        facts["table"] = summary(found)
    write(options.name, facts)


if __name__ == "__main__":
    raise SystemExit(main())
