"""What each method of post-training quantization brings on a teacher, without any training.

    python bench/ptq.py TEACHER DATA [--every 2] [--form int8_dynamic] [--method plain] [--method "observer mse"]

For each form: accuracy on validation and divergence from the float model in nats, plain, with every observer (static
forms), and with each of smooth, adaptive rounding and bias correction. Writes bench/results/ptq.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec
from edgekd.export.onnx import export_float
from edgekd.export.parity import onnx_logits
from edgekd.pipeline.setup import prepare
from edgekd.quantize import Quantize
from edgekd.quantize.build import build_form
from edgekd.quantize.forms import needs_examples
from edgekd.quantize.prepare import Sources
from edgekd.quantize.sensitivity import divergence
from edgekd.target import load_target, probe

RESULTS = Path(__file__).parent / "results" / "ptq.json"
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("smooth 0.5", {"smooth": 0.5}),
    ("adaptive rounding", {"rounding": "adaptive"}),
    ("bias correction", {"bias_correction": True}),
    ("all three", {"smooth": 0.5, "rounding": "adaptive", "bias_correction": True}),
)
OBSERVERS = ("moving_average", "percentile", "mse", "entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--form", action="append", help="[default: int8_dynamic, int8_static, int4_weights]")
    parser.add_argument("--method", action="append", help="[default: all of them]")
    parser.add_argument("--every", type=int, default=1, help="score on every so-many-th validation example")
    parser.add_argument("--max-length", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = prepare(options.teacher, DataSpec(path=str(options.data)), max_length=options.max_length, progress=Silent())
    validation = setup.validation.take(np.arange(0, len(setup.validation), options.every))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        graph = export_float(setup.teacher, setup.task.name, work / "float.onnx")
        reference = onnx_logits(graph, validation)
        metric = setup.task.score(reference, validation.labels)
        rows.append({"form": "float", "method": "", "accuracy": metric, "divergence": 0.0})
        for form in options.form or ("int8_dynamic", "int8_static", "int4_weights"):
            for name, changes in _methods(form):
                if options.method and name not in options.method:
                    continue
                settings = Quantize(lowering=form, fallback=False, tolerance=0.99, **changes)
                context = Context(
                    teacher=setup.teacher, task=setup.task, processor=setup.processor, train=setup.train,
                    validation=validation, test=None, target=probe(load_target("local")), budget=Budget(sequence=64),
                    work=work, cache=work, progress=Silent(),
                )  # fmt: skip
                began = time.monotonic()
                sources = Sources(settings, setup.teacher, setup.teacher, graph, context, metric)
                sources.of(form)
                seconds = time.monotonic() - began
                built = build_form(form, sources, reference)
                row = {
                    "form": form, "method": name, "accuracy": round(built.metric, 4),
                    "divergence": round(divergence(reference, built.logits), 5), "seconds": round(seconds, 1),
                    **{key: context.notes[key] for key in ("smoothed", "rounding_error") if key in context.notes},
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
    result = {"teacher": options.teacher.name, "examples": len(validation), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _methods(form: str) -> list[tuple[str, dict[str, Any]]]:
    observed = [(f"observer {name}", {"observer": name}) for name in OBSERVERS] if needs_examples(form) else []
    return [*METHODS, *observed]


if __name__ == "__main__":
    main()
