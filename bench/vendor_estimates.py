"""What the vendors' compilers say of a teacher and of a shallower student of it: estimates, nothing is run.

    python bench/vendor_estimates.py [--body TEACHER] [--depth 3] [--target NAME …]

Needs `edgekd[qualcomm]` and `edgekd[ethos-u]`; a target whose compiler is missing is listed as such. Estimates of
different vendors, or of different options, are not to be compared with each other: each row carries its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body, find_body
from edgekd.calibrate.estimates import Estimator
from edgekd.calibrate.shapes import uniform
from edgekd.devices import unavailable
from edgekd.latency.table import frame_of
from edgekd.target import Target, load_target, probe

TARGETS = (
    "npu-qualcomm-qcs9100", "npu-qualcomm-sa8797", "npu-ethos-u85-512", "npu-ethos-u65-512", "npu-ethos-u55-256",
)  # fmt: skip


def main() -> None:
    """Compile both models for every target and every form it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--body", default="bert-384", help="a standard body or a model folder")
    parser.add_argument("--depth", type=int, default=3, help="layers of the student")
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--target", action="append", dest="targets")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vendor_estimates.json")
    arguments = parser.parse_args()
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
        rows += _estimates(body, shapes, target, arguments.sequence)
    if not any("ms" in row for row in rows):
        print("nothing was estimated, so nothing is written")
        return
    result = {
        "command": " ".join(["python bench/vendor_estimates.py", *(Path(word).name for word in sys.argv[1:])]),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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


if __name__ == "__main__":
    main()
