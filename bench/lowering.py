"""All forms a model can be lowered to: what they say, how large they are and how fast, measured in turns.

    taskset -c 1 python bench/lowering.py TEACHER --data DIR [--cpu 1] [--blocks 120] [--forms a,b] [--small]

Every form is built as it would ship, with ranges from training examples, and runs in a session with default options on
one thread. Agreement and the largest difference of logits are those to the torch model on `--examples` of the
validation split, one unpadded example at a time; `accuracy` is on the same. A ratio is the median time of the plain
float32 graph over the form's, with a 95 % interval over blocks in which all forms take turns. `fixed` marks graphs
with the batch and length of the measurement. `nodes` counts operators in the file, `loaded` those that a default
session makes of them. With `--small` the model is cut to 2 heads and 320 neurons in each layer and drops tokens layer
by layer (its weights are then those that are left, so that only times, sizes and differences mean something).

Raw times go to bench/results/lowering.json, or to lowering-small.json with `--small`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from roofline import best, floors, peaks

from edgekd import host
from edgekd.arch import Layer
from edgekd.context import Silent
from edgekd.data import DataSpec
from edgekd.export.lower import CALIBRATED, calibrate, lower, operators_to_calibrate
from edgekd.export.onnx import export_float
from edgekd.export.operators import needs
from edgekd.export.parity import compare, onnx_logits, torch_logits
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import Samples, ratio_interval
from edgekd.operators import Operators
from edgekd.pipeline.setup import Setup, prepare
from edgekd.quantize.forms import feeds_of, sample
from edgekd.student import Student
from edgekd.surgery import Importance, cut
from edgekd.target import load_target

FORMS = (
    "fp32", "fp32_fused", "fp32_lean", "fp16_weights", "int8_dynamic", "int8_dynamic_fused", "int8_dynamic_lean",
    "int8_static", "int8_static_lean", "int8_qdq",
)  # fmt: skip
FIXED = ("fp32_lean", "int8_dynamic_lean", "int8_static_lean")
TOKENS = [40, 32, 24, 16, 8]
CALIBRATION = 128


def small(student: Student) -> Student:
    """The model with few heads and neurons, and fewer tokens in every layer."""
    layers = tuple(Layer(source=layer.source, heads=2, neurons=320) for layer in student.arch.layers)
    tokens = TOKENS[: len(layers) - 1]
    arch = Operators(tokens=tokens).reshape(replace(student.arch, layers=layers))
    return cut(student, arch, _any(student))


def _any(student: Student) -> Importance:
    """All heads and neurons are equally important."""
    layers = student.arch.layers
    return Importance(
        heads=tuple(torch.ones(layer.heads) for layer in layers),
        neurons=tuple(torch.ones(layer.neurons) for layer in layers),
        layers=torch.ones(len(layers)),
        hidden=torch.ones(student.arch.hidden),
    )


def build(student: Student, setup: Setup, forms: Sequence[str], folder: Path, sequence: int) -> dict[str, Path]:
    """The files by form; one that cannot be made is told and left out."""
    source = export_float(student, setup.task.name, folder / "float.onnx")
    feeds = feeds_of(sample(setup.train, CALIBRATION, seed=0))
    ranges: dict[Any, Any] = {}
    files = {}
    for form in [*forms, *(f"{form} fixed" for form in FIXED if form in forms)]:
        name, _, fixed = form.partition(" ")
        known = None
        if name in CALIBRATED:
            looked_at = operators_to_calibrate(name)
            if looked_at not in ranges:
                ranges[looked_at] = calibrate(source, feeds, operators=looked_at)
            known = ranges[looked_at]
        shape = {"batch": 1, "sequence": sequence} if fixed else {}
        output = folder / f"{form.replace(' ', '-')}.onnx"
        try:
            files[form] = lower(source, output, name, ranges=known, model_type=student.model.config.model_type, **shape)
        except Exception as error:  # noqa: BLE001 - the others can still be compared
            print(f"{form} is left out: {error}")
    return files


def loaded_nodes(file: Path, folder: Path) -> int:
    """How many operators a default session makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return len(onnx.load(folder / "loaded.onnx").graph.node)


def timed(files: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Samples]:
    """Times of all files, taken in turns."""
    settings = Settings(blocks=options.blocks, min_runs=2 * options.blocks, max_seconds=900.0)
    taken = measure(
        [Subject(name=form, path=file) for form, file in files.items()],
        target=load_target("local"),
        batch=1,
        sequence=options.sequence,
        threads=1,
        cpus=[options.cpu],
        settings=settings,
    )
    return {side.name: side for side in taken}


def facts_of(
    files: Mapping[str, Path], taken: Mapping[str, Samples], student: Student, setup: Setup, folder: Path, count: int
) -> dict[str, dict[str, Any]]:
    """Parity, size and ratio of every form."""
    examples = setup.validation.take(np.arange(min(count, len(setup.validation)), dtype=np.int64))
    reference = torch_logits(student.model, examples)
    found = {}
    for form, file in files.items():
        logits = onnx_logits(file, examples, threads=1)
        parity, side = compare(reference, logits), taken[form]
        low, high = ratio_interval(taken["fp32"], side, level=0.95)
        found[form] = {
            **parity.to_dict(),
            "accuracy": float((logits.argmax(axis=1) == np.asarray(examples.labels)).mean()),
            "size_bytes": file.stat().st_size,
            "nodes": len(onnx.load(file).graph.node),
            "loaded": loaded_nodes(file, folder),
            "needs": needs(file),
            "p50_ms": float(np.median(side.ms)),
            "p10_ms": float(np.quantile(side.ms, 0.1)),
            "ratio": float(np.median(taken["fp32"].ms) / np.median(side.ms)),
            "ratio_ci95": [low, high],
            "ratio_p10": float(np.quantile(taken["fp32"].ms, 0.1) / np.quantile(side.ms, 0.1)),
        }
    return found


def main() -> None:
    """Build, check, time, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(FORMS))
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--cpu", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=120)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    forms = list(dict.fromkeys(["fp32", *options.forms]))
    setup = prepare(options.teacher, DataSpec(path=str(options.data), seed=0), progress=Silent())
    student = small(setup.teacher) if options.small else setup.teacher
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = build(student, setup, forms, folder, options.sequence)
        rates = peaks()
        taken = timed(files, options)
        found = facts_of(files, taken, student, setup, folder, options.examples)
        told = floors(folder / "float.onnx", best(rates), batch=1, sequence=options.sequence)
    for form, facts in sorted(found.items(), key=lambda item: -float(item[1]["ratio"])):
        facts["over_int8_floor"] = facts["p50_ms"] / told["int8_floor_ms"]
        low, high = facts["ratio_ci95"]
        print(
            f"{form:26s} {facts['p50_ms']:7.3f} ms  {facts['ratio']:5.2f} [{low:.2f}, {high:.2f}]  "
            f"p10 {facts['ratio_p10']:5.2f}  floor x {facts['over_int8_floor']:4.2f}  agree {facts['agreement']:.3f}  "
            f"accuracy {facts['accuracy']:.4f}  {facts['size_bytes'] / 1e6:6.1f} MB  {facts['loaded']} operators"
        )
    peak = ", ".join(f"{precision} {rate:.0f} GMAC/s" for precision, rate in best(rates).items())
    print(f"peak: {peak}; int8 floor {told['int8_floor_ms']:.2f} ms, "
          f"{told['int8_floor_needed_ms']:.2f} without unread rows")  # fmt: skip
    stem = "lowering-small" if options.small else "lowering"
    out = options.out or Path(__file__).parent / "results" / f"{stem}.json"
    raw = {form: {"ms": np.round(side.ms, 4).tolist(), "block": side.block.tolist()} for form, side in taken.items()}
    result = {
        "cpu": host.cpu_name(), "onnxruntime": ort.__version__, "arch": student.arch.describe(), "batch": 1,
        "sequence": options.sequence, "threads": 1, "host": taken["fp32"].facts, "peaks_gmacs": rates, **told,
        "forms": found, "raw": raw,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
