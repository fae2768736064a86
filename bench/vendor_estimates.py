"""What the vendors' compilers say of a teacher and of a shallower student of it: estimates, nothing is run.

    python bench/vendor_estimates.py [--body TEACHER] [--depth 3] [--target NAME …]
    python bench/vendor_estimates.py --student FOLDER --data DATA [--keep-wide MODULE …] [--target NAME …]

With a student folder, perhaps trained under quantization, its own artifact is built in every form of the target with
the scales it has learned, scored on validation on this machine's CPU, and compiled: accuracy stands beside the
estimate.

Needs `edgekd[qualcomm]` and `edgekd[ethos-u]`; a target whose compiler is missing is listed as such. Estimates of
different vendors, or of different options, are not to be compared with each other: each row carries its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body, find_body
from edgekd.calibrate.estimates import SECONDS, Estimator
from edgekd.calibrate.shapes import uniform
from edgekd.context import Budget
from edgekd.data import DataSpec, load_splits
from edgekd.devices import compiler_of, unavailable
from edgekd.export.parity import torch_logits
from edgekd.export.scales import check_scales, weights_of
from edgekd.latency.table import frame_of
from edgekd.pipeline.artifact import Place, build, score
from edgekd.pipeline.setup import id2label
from edgekd.student import load_student, read_config
from edgekd.target import Target, load_target, probe
from edgekd.tasks import get_task, infer_task

TARGETS = (
    "npu-qualcomm-qcs9100", "npu-qualcomm-sa8797", "npu-ethos-u85-512", "npu-ethos-u65-512", "npu-ethos-u55-256",
)  # fmt: skip


def main() -> None:
    """Compile both models for every target and every form it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--body", default="bert-384", help="a standard body or a model folder")
    parser.add_argument("--depth", type=int, default=3, help="layers of the student")
    parser.add_argument("--student", type=Path, help="a student folder: its own artifact and accuracy")
    parser.add_argument("--data", help="data of the student")
    parser.add_argument("--keep-wide", action="append", default=[], metavar="MODULE", help="16 bits in int8_qdq")
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--target", action="append", dest="targets")
    parser.add_argument("--out", type=Path, help="[default: in bench/results]")
    arguments = parser.parse_args()
    if arguments.student and not arguments.data:
        parser.error("--student needs --data: what to calibrate and to score on")
    shapes: dict[str, Arch] = {}
    if not arguments.student:
        body = find_body(arguments.body)
        full = body.student.arch
        layer = full.layers[0]
        shapes = {"teacher": full, "student": uniform(full, arguments.depth, layer.heads, layer.neurons)}
    rows: list[dict[str, Any]] = []
    for name in arguments.targets or TARGETS:
        target = probe(load_target(name))
        if reason := unavailable(target):
            rows.append({"target": name, "kind": "unavailable", "reason": reason})
            print(f"{name}: unavailable, {reason}", flush=True)
            continue
        if arguments.student:
            rows += student_rows(arguments.student, arguments.data, target, arguments.sequence, arguments.keep_wide)
        else:
            rows += _estimates(body, shapes, target, arguments.sequence)
    if not any("ms" in row for row in rows):
        print("nothing was estimated, so nothing is written")
        return
    result = {
        "command": " ".join(["python bench/vendor_estimates.py", *(Path(word).name for word in sys.argv[1:])]),
        "rows": rows,
    }
    name = "vendor_estimates_student.json" if arguments.student else "vendor_estimates.json"
    out = arguments.out or Path(__file__).parent / "results" / name
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _estimates(body: Body, shapes: dict[str, Arch], target: Target, sequence: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as name, Estimator(target, Path(name)) as estimate:
        for form in target.forms:
            for label, arch in shapes.items():
                found = estimate(body, arch, frame_of(arch, form, 1, sequence if body.image is None else body.tokens))
                on_cpu = {row.type: row.calls for row in found.operators if row.provider.startswith("CPU")}
                rows.append(
                    {
                        "target": target.name, "kind": "vendor_estimate", "form": form, "model": label,
                        "shape": arch.describe(), "ms": found.ms, "low_ms": found.low_ms, "high_ms": found.high_ms,
                        "cycles": found.cycles, "on_cpu": on_cpu, "figures": dict(found.figures),
                        "options": dict(found.options), "notes": list(found.notes), "caveat": found.caveat,
                    }
                )  # fmt: skip
                bounds = f" ({found.low_ms:.4g}–{found.high_ms:.4g})" if found.low_ms and found.high_ms else ""
                print(f"{target.name} {form} {label}: {found.ms:.4g} ms{bounds}, on the CPU: {on_cpu or 'nothing'}",
                      flush=True)  # fmt: skip
    return rows


def student_rows(
    folder: Path, data: str, target: Target, sequence: int, keep_wide: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every form of a target: the student's artifact with its metric on validation, and the compiler's estimate."""
    task = get_task(infer_task(read_config(folder)))
    student, processor = load_student(folder, auto_class=task.auto_class), task.load_processor(folder)
    splits = load_splits(DataSpec(path=data), kind=task.kind, id2label=id2label(student.model.config))
    length = sequence if task.kind == "text" else None
    train, held = (task.encode(processor, part, length) for part in (splits.train, splits.validation))
    place = Place(target=target, budget=Budget(sequence=sequence), calibration=train)
    if held.labels is None:
        raise SystemExit(f"{data} has no labels to score on")
    floats = task.score(torch_logits(student.model, held), held.labels)
    spans = (student.quantization or {}).get("activations") or {}
    rows: list[dict[str, Any]] = []
    for form in target.forms:
        kept = {"keep_float": list(keep_wide)} if keep_wide and form == "int8_qdq" else {}
        own = replace(student, quantization={**(student.quantization or {}), "lowering": form, **kept})
        with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as name:
            made = build(own, task, held, Path(name) / "work", lowering=form, place=place, gate=False)
            scored = score(made.file, task, held)
            (Path(name) / "out").mkdir()
            found = compiler_of(target).compile(target, made.file, Path(name) / "out", timeout=SECONDS)
            checked = None
            if made.file.suffix == ".onnx":
                checked = check_scales(made.file, weights_of(student.model), spans).to_dict()
        rows.append(
            {
                "target": target.name, "kind": "vendor_estimate", "form": form, "model": folder.name,
                "shape": student.arch.describe(), "ms": found.ms, "low_ms": found.low_ms, "high_ms": found.high_ms,
                "cycles": found.cycles, "figures": dict(found.figures), "options": dict(found.options),
                "quality": {"split": "validation", "float": floats, **scored}, "parity": made.parity.to_dict(),
                "scales": checked, "keep_wide": kept.get("keep_float", []), "caveat": found.caveat,
                "notes": list(found.notes),
            }
        )  # fmt: skip
        said = f"{scored['metric']} {scored['value']:.4f} (float {floats:.4f}), {made.parity.agreement:.1%} agree"
        print(f"{target.name} {form}: {found.ms:.4g} ms, {said}", *rows[-1]["notes"], sep="\n  ", flush=True)
    return rows


if __name__ == "__main__":
    main()
