"""Accuracy of a model trained under quantization, against quantization after training; which losses, how many epochs.

    python bench/qat.py                                            # digits, with a teacher made on the spot
    python bench/qat.py TEACHER --data DIR --work FOLDER --seeds 0 1 2

The student is the teacher itself. Five ways to be quantized, each as the form that would ship:

    int8_dynamic  8-bit weights per channel, activations with a range for every example
    int8_static   the same with ranges that stand, learned in training
    w4a8          4-bit weights per channel, computed in 8-bit integers
    w4_groups     4-bit weights in groups of 32, packed (MatMulNBits)
    w2a8          ternary weights (TWN), computed in 8-bit integers

Phases, each looks at validation alone but for the last:

    losses   every set of `LOSSES` on `--sweep` schemes, first seed, one epoch; by which of them the student says most
             nearly what its teacher says
    epochs   the chosen losses for 1, 2, … `--epochs`, first seed
    final    the chosen losses and epochs, all schemes and seeds, and all schemes without training
    score    the files on the test split, which nothing before has seen

What is finished stays in the work folder: the same command goes on. `--jobs` processes of one thread train.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import digits_teacher, fingerprint, head, mean_and_deviation, one_thread, require_own_work, write
from common import surroundings as of_machine

PREDICTION = {"soft_cross_entropy": 1.0}
HIDDEN, OUTPUT, MAP = {"raw_hidden_mse": 1.0}, {"attention_output_mse": 1.0}, {"attention_kl": 1.0}
LOSSES: dict[str, dict[str, Any]] = {
    "labels": {"cross_entropy": 1.0},
    "prediction": PREDICTION,
    "prediction+hidden": PREDICTION | HIDDEN,
    "prediction+output": PREDICTION | OUTPUT,
    "prediction+map": PREDICTION | MAP,
    "prediction+hidden+output": PREDICTION | HIDDEN | OUTPUT,
    "prediction+hidden+map": PREDICTION | HIDDEN | MAP,
    "prediction+hidden+output+map": PREDICTION | HIDDEN | OUTPUT | MAP,
    "forward_kl+hidden_mse": {"forward_kl": {"weight": 1.0, "temperature": 2.0}, "hidden_mse": 1.0},
    "forward_kl+hidden_mse+output": {"forward_kl": {"weight": 1.0, "temperature": 2.0}, "hidden_mse": 1.0} | OUTPUT,
}
"""Parts of the objective of Kim et al. 2022 one by one and together, and what `distill` does."""
SCHEMES: dict[str, dict[str, Any]] = {
    "int8_dynamic": {"lowering": "int8_dynamic"},
    "int8_static": {"lowering": "int8_static"},
    "int8_static_learned": {"lowering": "int8_static", "learned": True},
    "w4a8": {"lowering": "int8_dynamic", "weight_bits": 4},
    "w4_groups": {"lowering": "int4_weights", "weight_bits": 4},
    "w2a8": {"lowering": "int8_dynamic", "weight_bits": 2},
}
RATES = {"w2a8": 1e-4, "w4a8": 1e-4}
"""Learning rates where few bits ask for more than `--learning-rate`."""


@dataclass(frozen=True)
class Job:
    """One training, or (0 epochs) quantization without."""

    scheme: str
    losses: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.scheme}-{self.losses}-{self.epochs}-{self.seed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-qat"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--sweep", nargs="+", choices=SCHEMES, default=["int8_static", "w2a8"])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--phase", choices=("losses", "epochs", "final", "score", "all"), default="all")
    parser.add_argument("--name", default="qat")
    options = parser.parse_args()
    if options.teacher is None:
        options.teacher = digits_teacher(options.work / "teacher", options.data, model="scratch:vit-small", epochs=12)
    own = {"teacher": fingerprint(options.teacher), "data": options.data, "rate": options.learning_rate}
    require_own_work(options.work, own)
    for phase in ("losses", "epochs", "final"):
        if options.phase in (phase, "all"):
            run(options, jobs_of(options, phase))
    if options.phase in ("score", "all"):
        report(options)
    return 0


def jobs_of(options: argparse.Namespace, phase: str) -> list[Job]:
    first = options.seeds[0]
    if phase == "losses":
        return [Job(scheme, losses, 1, first) for scheme in options.sweep for losses in options.losses]
    if phase == "epochs":
        chosen = {scheme: best_losses(options, scheme) for scheme in options.sweep}
        return [Job(scheme, chosen[scheme], epochs, first) for scheme in options.sweep for epochs in options.epochs]
    trained = [
        Job(scheme, best_losses(options, near(options, scheme)), best_epochs(options, near(options, scheme)), seed)
        for seed in options.seeds
        for scheme in options.schemes
    ]
    return [*(Job(scheme, "prediction", 0, first) for scheme in options.schemes), *trained]


def near(options: argparse.Namespace, scheme: str) -> str:
    """The swept scheme whose losses and epochs are taken: of the same bits where there is one."""
    few = SCHEMES[scheme].get("weight_bits", 8) < 8
    alike = [each for each in options.sweep if (SCHEMES[each].get("weight_bits", 8) < 8) == few]
    return str(scheme if scheme in options.sweep else (alike or options.sweep)[0])


def best_losses(options: argparse.Namespace, scheme: str) -> str:
    """Those with the best metric on validation; of equal ones, those whose logits are nearest to the teacher's."""
    facts = {losses: facts_of(options, Job(scheme, losses, 1, options.seeds[0])) for losses in options.losses}
    return max(facts, key=lambda losses: (facts[losses]["validation"], -facts[losses]["distance"]))


def best_epochs(options: argparse.Namespace, scheme: str) -> int:
    """The fewest within a thousandth of the best."""
    losses = best_losses(options, scheme)
    found = {e: facts_of(options, Job(scheme, losses, e, options.seeds[0]))["validation"] for e in options.epochs}
    return min(epochs for epochs, value in found.items() if value >= max(found.values()) - 1e-3)


def facts_of(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    file = options.work / job.name / "facts.json"
    if not file.is_file():
        raise SystemExit(f"{job.name} is not trained yet: run the phase before")
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def run(options: argparse.Namespace, jobs: list[Job]) -> None:
    """Do what is not done yet, in processes of one thread."""
    left = [job for job in dict.fromkeys(jobs) if not (options.work / job.name / "facts.json").is_file()]
    with multiprocessing.get_context("spawn").Pool(options.jobs, one_thread) as pool:
        for job, facts in pool.imap_unordered(_train, [(options, job) for job in left]):
            print(
                f"{job.name:60} validation {facts['validation']:.4f} (untrained {facts['untrained']:.4f}, "
                f"float {facts['float']:.4f})  distance {facts['distance']:.4f}  {facts['seconds']:.0f} s",
                flush=True,
            )


def surroundings(options: argparse.Namespace, seed: int, work: Path) -> tuple[Any, Any]:
    from edgekd.context import Budget
    from edgekd.target import Target

    forms = tuple(dict.fromkeys(settings["lowering"] for settings in SCHEMES.values()))
    target = Target(
        name="cpu", title="cpu", runtime="onnxruntime", device="cpu", precisions=("int8", "int4", "fp32"),
        fast_precisions=("int8", "fp32"), lowerings=(*forms, "fp32"),
    )  # fmt: skip
    return of_machine(
        options.teacher, options.data, work, options.work / "cache", target=target, budget=Budget(), seed=seed
    )  # fmt: skip


def settings_of(options: argparse.Namespace, job: Job) -> Any:
    from edgekd.quantize import Quantize

    return Quantize(
        epochs=job.epochs,
        losses=LOSSES[job.losses],
        learning_rate=max(RATES.get(job.scheme, 0.0), options.learning_rate),
        batch_size=options.batch_size,
        **SCHEMES[job.scheme],
    )


def _train(task: tuple[argparse.Namespace, Job]) -> tuple[Job, dict[str, Any]]:
    from edgekd.distill.teachers import predict
    from edgekd.quantize.qat import quantize_only, train_quantized

    options, job = task
    folder = options.work / job.name
    setup, context = surroundings(options, job.seed, folder / "work")
    settings, began = settings_of(options, job), time.monotonic()
    make = train_quantized if job.epochs else quantize_only
    student = make(settings, setup.teacher, context)
    seconds = time.monotonic() - began
    student.save(folder / "student")
    theirs = predict(setup.teacher.model, context.validation)
    truth = context.validation.labels
    # Weights are rounded here, activations are not: how far training has come is told by its own evaluation.
    ours = predict(student.model, context.validation)
    history = context.notes.get("training", {}).get("history", [])
    untrained = context.notes["untrained_metric"]
    facts = {
        "float": context.task.score(theirs, truth),
        "untrained": untrained,
        "validation": max([untrained, *(each["metric"] for each in history)]),
        "distance": float(np.square(ours - theirs).mean()),
        "history": history,
        "seconds": seconds,
        "scheme": student.quantization["scheme"],
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    return job, facts


def report(options: argparse.Namespace) -> None:
    """Make the files, score them on the test split, and write all that was seen."""
    setup, context = surroundings(options, options.seeds[0], options.work / "score")
    base = teacher_score(options, setup)
    rows = [scored(options, job, setup, context) for job in jobs_of(options, "final")]
    table = []
    for scheme in options.schemes:
        for trained in (False, True):
            own = [row for row in rows if row["scheme"] == scheme and bool(row["epochs"]) is trained]
            tests = [row["test"] for row in own]
            mean, spread = mean_and_deviation(tests)
            table.append({
                "scheme": scheme, "trained": trained, "losses": own[0]["losses"] if trained else None,
                "epochs": own[0]["epochs"], "test_mean": mean, "test_sd": spread, "seeds": len(own),
                "drop_points": 100 * (base["value"] - mean), "size_mb": own[0]["size_mb"],
                "agreement": float(np.mean([row["agreement"] for row in own])),
            })  # fmt: skip
            print(f"{scheme:20} {'trained' if trained else 'after training':15} test {mean:.4f} ± {spread or 0:.4f}  "
                  f"{100 * (mean - base['value']):+.2f} points  {own[0]['size_mb']:.1f} MB")  # fmt: skip
    facts = {
        **head(),
        "teacher": {"test": base["value"], "n": base["n"]},
        "table": table,
        "losses": swept(options, "losses"),
        "epochs": swept(options, "epochs"),
        "rows": rows,
    }
    write(options.name, facts)


def swept(options: argparse.Namespace, phase: str) -> list[dict[str, Any]]:
    """What a phase of choosing has seen, on validation."""
    found = []
    for job in jobs_of(options, phase):
        facts = facts_of(options, job)
        seen = {key: facts[key] for key in ("validation", "untrained", "float", "distance", "seconds")}
        found.append({"scheme": job.scheme, "losses": job.losses, "epochs": job.epochs, "seed": job.seed, **seen})
    return found


def teacher_score(options: argparse.Namespace, setup: Any) -> dict[str, Any]:
    from edgekd.export.onnx import export_float
    from edgekd.pipeline.artifact import score

    file: Path = options.work / "teacher.onnx"
    if not file.is_file():
        export_float(setup.teacher, setup.task.name, file)
    found: dict[str, Any] = score(file, setup.task, setup.test)
    return found


def scored(options: argparse.Namespace, job: Job, setup: Any, context: Any) -> dict[str, Any]:
    """The test metric of the file that would ship, and how often the runtime says what fake quantization says."""
    from edgekd.pipeline.artifact import Place, build, score
    from edgekd.student import load_student

    folder = options.work / job.name
    student = load_student(folder / "student", auto_class=setup.task.auto_class)
    form = SCHEMES[job.scheme]["lowering"]
    place = Place(target=context.target, budget=context.budget, calibration=setup.train)
    made = build(student, setup.task, setup.validation, folder / form, lowering=form, place=place, gate=False)
    facts = facts_of(options, job)
    return {
        "scheme": job.scheme, "losses": job.losses, "epochs": job.epochs, "seed": job.seed, "form": form,
        "validation": facts["validation"], "test": score(made.file, setup.task, setup.test)["value"],
        "validation_file": score(made.file, setup.task, setup.validation)["value"],
        "agreement": made.parity.agreement, "size_mb": made.file.stat().st_size / 1e6, "seconds": facts["seconds"],
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
