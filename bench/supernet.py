"""Several targets or budgets from one supernet against runs of their own: accuracy, speedup, verdict, seconds of each.

    python bench/supernet.py TEACHER --data DIR --targets local cpu-x86-openvino npu-qualcomm-qcs9100 --speedups 2
    python bench/supernet.py TEACHER --data DIR --speedups 3 6 12

The first route trains a supernet once; for each target and budget, search, prune and a short distillation follow in the
same run folder, where the supernet is found trained. The second route runs search, prune and a plain distillation anew
for each of them. Both run `edgekd compress` as a user types it, with recipes that differ in these stages alone. As a
recipe has one budget for all its targets, the first route has one command for each budget, the second one for each
target and budget. `seconds` is the whole command; `stages` has the seconds of each stage that this command ran itself,
and 0 for one taken up from before. `--short-epochs 0` leaves the distillation after the supernet out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from edgekd.files import write_json
from edgekd.host import cpu_name, logical_cpus

Options = argparse.Namespace


def main() -> int:
    """Run both routes for every budget and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--targets", nargs="+", default=["local"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[3.0, 6.0, 12.0])
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--supernet-epochs", type=int, default=6)
    parser.add_argument("--short-epochs", type=int, default=2, help="of distillation after the supernet")
    parser.add_argument("--epochs", type=int, default=6, help="of distillation without a supernet")
    parser.add_argument("--operators", action="store_true", help="with the operators stage in both routes")
    parser.add_argument("--no-quantize", action="store_true")
    parser.add_argument("--limit", type=int, help="at most so many training examples")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run, as in compress")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder, and go on with what is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "supernet.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        routes: dict[str, list[dict[str, Any]]] = {"supernet": [], "separate": []}
        for speedup in options.speedups:
            for route, rows in routes.items():
                for targets in [options.targets] if route == "supernet" else [[name] for name in options.targets]:
                    kept = folder / f"{route}-{'-'.join(targets)}-{speedup:g}.json"
                    row = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
                    if not row or "error" in row:
                        first, settings = not rows, recipe(route, speedup, targets, options)
                        row = run(settings, folder / route, options, first=first, failed=row.get("seconds"))
                    rows.append(row)
                    write_json(kept, row)
                    print(json.dumps({"route": route, **rows[-1]}), flush=True)
                    write(options, routes)
    return 0


def recipe(route: str, speedup: float, targets: list[str], options: Options) -> dict[str, Any]:
    """The recipe of one budget on one route."""
    shared = route == "supernet"
    stages: list[dict[str, Any]] = [{"supernet": {"epochs": options.supernet_epochs}}] if shared else []
    stages += [{"search": {}}, {"prune": {}}, *([{"operators": {}}] if options.operators else [])]
    epochs = options.short_epochs if shared else options.epochs
    stages += [{"distill": {"epochs": epochs}}] if epochs else []
    stages += [] if options.no_quantize else [{"quantize": {}}]
    budget = {"speedup": speedup, "sequence": options.sequence, "threads": options.threads}
    place = Path(options.data)
    data = {"path": str(place.absolute()) if place.exists() else options.data, "limit": options.limit}
    return {
        "teacher": str(Path(options.teacher).absolute()),
        "data": {key: value for key, value in data.items() if value is not None},
        "targets": targets,
        "budget": {key: value for key, value in budget.items() if value is not None},
        "stages": stages,
    }


def run(settings: dict[str, Any], out: Path, options: Options, *, first: bool, failed: float | None) -> dict[str, Any]:
    """One `edgekd compress`: what it reached, and how long it took.

    What a `failed` attempt took is added, or, in the `first` row, what a supernet took that a killed bench has left.
    """
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    before = finished(out)
    earlier = failed if failed is not None else sum(before.values()) if first else 0.0
    changes = [argument for change in options.set for argument in ("--set", change)]
    command = [sys.executable, "-m", "edgekd", "compress", "--recipe", str(file), *changes, "--out", str(out), "--json"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = round(time.monotonic() - began + earlier, 1)
    row: dict[str, Any] = {"speedup_asked": settings["budget"]["speedup"], "seconds": seconds, "exit": done.returncode}
    answer = json.loads(done.stdout) if done.stdout.strip() else {}
    if not answer.get("bundles"):
        said = answer.get("error") or answer.get("verdict") or done.stderr.strip()[-300:]
        return {**row, "error": str(said).replace(str(out), "RUN")}
    verdicts = {verdict["target"]: verdict["status"] for verdict in answer["verdict"]}
    row["bundles"] = [bundle(name, Path(place), {} if first else before) for name, place in answer["bundles"].items()]
    for found in row["bundles"]:
        found["verdict"] = verdicts.get(found["target"])
    return row


def bundle(target: str, folder: Path, before: Mapping[str, float]) -> dict[str, Any]:
    """What one bundle reached; stages in `before` were there already and took nothing."""
    manifest = json.loads((folder / "edgekd.json").read_text("utf-8"))
    entries = {entry["stage"]: entry for entry in manifest["ledger"]}
    latency, quality = manifest["latency"][0], manifest["quality"]
    return {
        "target": target,
        "latency_kind": latency.get("kind"),
        "speedup": latency.get("speedup"),
        "speedup_ci99": latency.get("speedup_ci99"),
        "p50_ms": latency.get("p50_ms"),
        "metric": quality["value"],
        "metric_ci95": quality.get("ci95"),
        "split": quality.get("split"),
        "teacher_metric": manifest["teacher"]["value"],
        "shape": manifest["artifact"]["shape"],
        "lowering": manifest["artifact"]["lowering"],
        "stages": {name: 0 if name in before else entry.get("seconds") for name, entry in entries.items()},
    }


def finished(out: Path) -> dict[str, float]:
    """The stage that does not depend on the budget, if it is in the run folder already, with the seconds it took."""
    entries = [json.loads(file.read_text("utf-8"))["entry"] for file in out.glob("*-supernet/stage.json")]
    return {entry["stage"]: entry["seconds"] for entry in entries}


def write(options: Options, routes: dict[str, list[dict[str, Any]]]) -> None:
    """Write the rows so far, with the totals of each route."""
    facts = {
        "teacher": Path(options.teacher).name,
        "data": Path(options.data).name,
        "targets": options.targets,
        "epochs": {
            "supernet": options.supernet_epochs,
            "distill_after_supernet": options.short_epochs,
            "distill_separate": options.epochs,
        },
        "limit": options.limit,
        "set": options.set,
        "machine": {"cpu": cpu_name(), "cpus": len(logical_cpus()), "python": platform.python_version()},
        "seconds": {route: round(sum(row["seconds"] for row in rows), 1) for route, rows in routes.items()},
        **routes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, facts)


if __name__ == "__main__":
    raise SystemExit(main())
