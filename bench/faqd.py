"""Quantized training without labels by feature affinity (FAQD), on images: accuracy after 8, 4 and 2 bits.

    python bench/faqd.py                                          # digits
    python bench/faqd.py --data DIR --model resnet vit --seeds 0 1 2 --epochs 5 --teacher-epochs 10

A teacher is trained on the spot, with labels. Its copy is then quantized, static ranges, in these ways:

    untrained      calibrated and rounded
    labels         logits and cross-entropy, with labels: what labels would be worth
    logits         MSE of logits alone, no labels
    affinity       logits and the exact feature affinity, no labels
    affinity_fast  logits and the fast one, no labels

Training without labels does not see them: they are taken off the data. The weights with the best agreement with the
teacher on validation, labelled by the teacher, are kept. Reported is the accuracy of the ONNX files on the test split.
What is finished stays in the work folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import head, mean_and_deviation, require_own_work, write
from common import surroundings as of_machine

ARMS: dict[str, dict[str, Any] | None] = {
    "untrained": None,
    "labels": {"mse": 1.0, "cross_entropy": 0.3},
    "logits": {"mse": 1.0},
    "affinity": {"mse": 1.0, "feature_affinity": 0.1},
    "affinity_fast": {"mse": 1.0, "feature_affinity_fast": 0.1},
}
"""Weights of the losses as in the paper."""
RATES = {8: 1e-4, 4: 3e-4, 2: 5e-4}
FORM = "int8_static"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-faqd"))
    parser.add_argument(
        "--model", nargs="+", choices=("resnet", "vit", "resnet-small", "vit-small"), default=["resnet"]
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4, 2), default=[8, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=0, help="training examples of the quantized training; 0: all")
    parser.add_argument("--name", default="faqd")
    options = parser.parse_args()
    keys = ("data", "epochs", "teacher_epochs", "batch_size", "limit")
    require_own_work(options.work, {key: getattr(options, key) for key in keys})
    rows = []
    for model in options.model:
        teacher = make_teacher(options, model)
        for bits, arm, seed in product(options.bits, options.arms, options.seeds):
            rows.append(one(options, teacher, model, bits, arm, seed if ARMS[arm] else options.seeds[0]))
    report(options, rows)
    return 0


def make_teacher(options: argparse.Namespace, model: str) -> Path:
    from edgekd.context import Silent
    from edgekd.data import DataSpec
    from edgekd.distill.finetune import Finetune, finetune

    folder: Path = options.work / f"teacher-{model}"
    if not (folder / "finetune.json").is_file():
        settings = Finetune(epochs=options.teacher_epochs, batch_size=64, augment="shift")
        finetune(f"scratch:{model}", DataSpec(path=options.data), folder, settings=settings, seed=0, progress=Silent())
    return folder


def one(options: argparse.Namespace, teacher: Path, model: str, bits: int, arm: str, seed: int) -> dict[str, Any]:
    """One quantized student: trained, exported and scored, if it has not been yet."""
    from edgekd.distill.teachers import predict
    from edgekd.pipeline.artifact import Place, build, score
    from edgekd.quantize import Quantize
    from edgekd.quantize.qat import quantize_only, train_quantized

    folder = options.work / f"{model}-{bits}-{arm}-{seed}"
    if (folder / "facts.json").is_file():
        found: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        return found
    setup, context = surroundings(options, teacher, seed, folder / "work")
    losses, labelled = ARMS[arm], arm == "labels"
    if not labelled:
        answers = predict(setup.teacher.model, context.validation).argmax(-1)
        context = replace(
            context,
            train=replace(context.train, labels=None),
            validation=replace(context.validation, labels=answers),
        )
    settings = Quantize(
        lowering=FORM, weight_bits=bits, epochs=options.epochs, batch_size=options.batch_size,
        learning_rate=RATES[bits], freeze_embeddings=False, **({"losses": losses} if losses else {}),
    )  # fmt: skip
    began = time.monotonic()
    make = train_quantized if losses else quantize_only
    student = make(settings, setup.teacher, context)
    seconds = time.monotonic() - began
    place = Place(target=context.target, budget=context.budget, calibration=setup.train)
    made = build(student, setup.task, setup.validation, folder / FORM, lowering=FORM, place=place, gate=False)
    base = build(setup.teacher, setup.task, setup.validation, folder / "float", lowering="fp32")
    quality, reference = (score(each.file, setup.task, setup.test) for each in (made, base))
    facts = {
        "model": model, "bits": bits, "arm": arm, "seed": seed, "labelled": labelled, "test": quality["value"],
        "teacher_test": reference["value"], "n": quality["n"],
        "untrained_validation": context.notes["untrained_metric"],
        "validation": [each["metric"] for each in context.notes.get("training", {}).get("history", [])],
        "size_mb": made.file.stat().st_size / 1e6, "seconds": seconds,
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    print(f"{model:12} {bits} bits {arm:14} seed {seed} test {quality['value']:.4f} (teacher "
          f"{reference['value']:.4f})  {seconds:.0f} s", flush=True)  # fmt: skip
    return facts


def surroundings(options: argparse.Namespace, teacher: Path, seed: int, work: Path) -> tuple[Any, Any]:
    from edgekd.context import Budget
    from edgekd.target import Target

    target = Target(
        name="cpu", title="cpu", runtime="onnxruntime", device="cpu", precisions=("int8", "fp32"),
        fast_precisions=("int8", "fp32"), lowerings=(FORM, "fp32"),
    )  # fmt: skip
    setup, context = of_machine(
        str(teacher), options.data, work, options.work / "cache", target=target, budget=Budget(), seed=seed
    )
    if options.limit:
        context = replace(context, train=context.train.take(np.arange(options.limit)))
    return setup, context


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    table = []
    for model, bits, arm in product(options.model, options.bits, options.arms):
        tests = [row["test"] for row in rows if (row["model"], row["bits"], row["arm"]) == (model, bits, arm)]
        teacher = next(row["teacher_test"] for row in rows if row["model"] == model)
        mean, spread = mean_and_deviation(tests if ARMS[arm] else tests[:1])
        table.append({"model": model, "bits": bits, "arm": arm, "test_mean": mean, "test_sd": spread,
                      "teacher": teacher, "drop_points": 100 * (teacher - mean)})  # fmt: skip
        print(f"{model:12} {bits} bits {arm:14} {mean:.4f} ± {spread or 0:.4f}  {100 * (mean - teacher):+.2f} points")
    write(options.name, {**head(), "table": table, "rows": rows})


if __name__ == "__main__":
    raise SystemExit(main())
