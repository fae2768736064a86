"""How well a latency table predicts architectures it was not made from: BERT and ViT, fp32 and int8, on this CPU.

    edgekd calibrate --body bert-256 --body bert-384 --body bert-512 --body vit-192-96 --body vit-192-224 \\
        --body vit-384-96 --body vit-384-224 --threads 1 --out profiles/local.json
    python bench/latency_prediction.py profiles/local.json

Every frame of the table (body, precision, batch, length) gets random architectures, a third uniform and the rest with
a width of its own in every layer, none of which the table has seen. They are timed as `edgekd calibrate` times: in
turns with three reference models of their own frame, which say how fast the machine is at that moment. The prediction
is compared with the measured median at the speed the references had when the table was made; search does the same when
it uses a table. The error against the plain median, which contains how the machine has changed since, is reported
beside it. With a table of a compiler's estimates, the compiler's own figure is the truth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import host
from edgekd.arch import Arch
from edgekd.calibrate.bodies import STANDARD, Body
from edgekd.calibrate.estimates import Estimator
from edgekd.calibrate.graphs import build_graphs
from edgekd.calibrate.run import frame_files, reference_ms
from edgekd.calibrate.shapes import mixed
from edgekd.calibrate.timing import GROUP as GROUP_SETTINGS
from edgekd.calibrate.timing import time_beside
from edgekd.errors import ModelError
from edgekd.latency.bench import Subject
from edgekd.latency.cell import Frame
from edgekd.latency.table import LatencyTable, Point, load
from edgekd.target import Target, load_target, probe

GROUP = 13
TRUTH = replace(GROUP_SETTINGS, blocks=64, min_runs=64)
"""Twice as many rounds as a calibration takes: what is compared with should not be the noisier of the two."""


def main() -> None:
    """Draw, build, time, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = Path(__file__).parent.parent / "profiles" / "local.json"
    parser.add_argument("table", type=Path, nargs="?", default=shipped)
    parser.add_argument("--count", type=int, default=210, help="architectures in all, at least")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--out", type=Path, help="JSON [default: bench/results/latency_prediction-TARGET.json]")
    parser.add_argument("--models", type=Path, help="folder that keeps what is built for a compiler")
    parser.add_argument("--truth", type=Path, help="an earlier result: take its latencies and only predict anew")
    arguments = parser.parse_args()
    table = load(arguments.table)
    target = probe(load_target(table.conditions.target))
    out = arguments.out or Path(__file__).parent / "results" / f"latency_prediction-{target.name}.json"
    if arguments.truth is not None:
        earlier = json.loads(arguments.truth.read_text(encoding="utf-8"))
        seen = {(point.frame.describe(), point.layers) for point in table.points}
        unseen = [row for row in earlier["rows"] if (row["frame"], tuple(map(tuple, row["layers"]))) not in seen]
        _write(out, table, [_again(row, table) for row in unseen], f"truth: {earlier['command']}")
        return
    groups = _groups(table)
    each = -(-arguments.count // len(groups))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as name:
        for number, (body, frames) in enumerate(groups):
            archs = _unseen(body, frames, table, each, arguments.seed + number)
            if table.conditions.kind == "vendor_estimate":
                with Estimator(target, Path(name), arguments.models) as estimate:
                    rows += _estimated(body, frames, archs, table, estimate)
            else:
                rows += _timed(body, frames, archs, table, target, Path(name))
            print(f"{number + 1}/{len(groups)} {frames[0].describe()}: {len(rows)} points", flush=True)
    _write(out, table, rows, "")


def _write(out: Path, table: LatencyTable, rows: list[dict[str, Any]], note: str) -> None:
    result = {
        "command": " ".join(["python bench/latency_prediction.py", *(Path(word).name for word in sys.argv[1:])]),
        **({"note": note} if note else {}),
        "machine": {"cpu": host.cpu_name(), "cores": host.usable_cores(), "conditions": vars(table.conditions)},
        "summary": _summary(rows),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # One line a row: there are hundreds.
    head, lines = json.dumps(result, indent=1)[:-2], ",\n".join(json.dumps(row) for row in rows)
    out.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    out.with_suffix(".svg").write_text(_scatter(rows), encoding="utf-8")
    for group, facts in result["summary"].items():
        within = f"within 5 %: {facts['within_5']:.1%}  within 10 %: {facts['within_10']:.1%}"
        print(f"{group:40} n={facts['n']:4} {within}  median {facts['median']:.1%}  worst {facts['max']:.1%}")


def _again(row: dict[str, Any], table: LatencyTable) -> dict[str, Any]:
    """The same truth, predicted from the table as it is now."""
    frame = next(cell.frame for cell in table.cells if cell.frame.describe() == row["frame"])
    layers = tuple((source, heads, neurons) for source, heads, neurons in row["layers"])
    more = {key: row[key] for key in ("now_ms", "noise") if key in row}
    return _row(table, frame, Point(frame=frame, layers=layers, ms=row["ms"]).arch, row["ms"], **more)


def _groups(table: LatencyTable) -> list[tuple[Body, list[Frame]]]:
    """Bodies with the frames that share a graph but for the lowering: each architecture is timed in every lowering."""
    bodies = [make() for name, make in STANDARD.items() if not name.startswith("resnet")]
    found: dict[tuple[str, int, int | None], list[Frame]] = {}
    for cell in table.cells:
        frame = cell.frame
        body = next((body for body in bodies if _fits(body, frame)), None)
        if body is not None:
            found.setdefault((body.name, frame.batch, frame.sequence), []).append(frame)
    by_name = {body.name: body for body in bodies}
    return [(by_name[name], frames) for (name, _, _), frames in found.items()]


def _fits(body: Body, frame: Frame) -> bool:
    arch = body.student.arch
    same = (arch.family, arch.hidden, arch.head_dim) == (frame.family, frame.hidden, frame.head_dim)
    return same and body.tokens in (None, frame.sequence)


def _unseen(body: Body, frames: list[Frame], table: LatencyTable, count: int, seed: int) -> list[Arch]:
    known = {point.layers for point in table.points if point.frame in frames}
    drawn = mixed(body.student.arch, [True] * len(body.student.arch.layers), count + len(known), seed=seed)
    return [arch for arch in drawn if _layers(arch) not in known][:count]


def _layers(arch: Arch) -> tuple[tuple[int, int, int], ...]:
    return tuple((layer.source, layer.heads, layer.neurons) for layer in arch.layers)


def _timed(
    body: Body, frames: list[Frame], archs: list[Arch], table: LatencyTable, target: Target, work: Path
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    steady = list(dict.fromkeys(arch for frame in frames for arch in reference_ms(table, frame, body)))
    for start in range(0, len(archs), GROUP):
        part = archs[start : start + GROUP]
        files = {arch: frame_files(work, i, frames, target) for i, arch in enumerate([*steady, *part])}
        for arch, paths in files.items():
            build_graphs(body, arch, {path: frame for frame, path in paths.items()}, static=target.is_static)
        for frame in frames:
            known = reference_ms(table, frame, body)
            timed = time_beside(
                [(Subject(name="reference", path=files[arch][frame]), ms) for arch, ms in known.items()],
                [Subject(name=str(i), path=files[arch][frame]) for i, arch in enumerate(part)],
                target, batch=frame.batch, sequence=frame.sequence, threads=table.conditions.threads, settings=TRUTH,
            )  # fmt: skip
            for arch, one in zip(part, timed, strict=True):
                rows.append(_row(table, frame, arch, one.ms, now_ms=one.now_ms, noise=one.noise))
    return rows


def _estimated(
    body: Body, frames: list[Frame], archs: list[Arch], table: LatencyTable, estimate: Estimator
) -> list[dict[str, Any]]:
    rows = []
    for arch in archs:
        for frame in frames:
            try:
                truth = estimate(body, arch, frame).ms
            except ModelError as error:
                print(f"  left out, the compiler refuses {arch.describe()}: {error}", flush=True)
                continue
            rows.append(_row(table, frame, arch, truth))
    return rows


def _row(table: LatencyTable, frame: Frame, arch: Arch, ms: float, **more: float) -> dict[str, Any]:
    found = table.predict(arch, lowering=frame.lowering, batch=frame.batch, sequence=frame.sequence)
    widths = {(layer.heads, layer.neurons) for layer in arch.layers}
    return {
        "frame": frame.describe(), "family": frame.family, "lowering": frame.lowering, "uniform": len(widths) == 1,
        "layers": _layers(arch), "ms": ms, "predicted_ms": found.ms, "error": found.ms / ms - 1,
        "extrapolates": found.extrapolates, **more,
    }  # fmt: skip


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    groups = {"all": rows}
    for row in rows:
        groups.setdefault(f"{row['family']} {row['lowering']}", []).append(row)
        groups.setdefault("uniform" if row["uniform"] else "non-uniform", []).append(row)
    summary = {name: _facts([row["error"] for row in group]) for name, group in groups.items()}
    if "now_ms" in rows[0]:
        summary["all, against the plain median (drift included)"] = _facts(
            [row["predicted_ms"] / row["now_ms"] - 1 for row in rows]
        )
        summary["all"]["median_noise_of_the_truth"] = statistics.median(row["noise"] for row in rows)
    summary["all"]["architectures"] = len({(row["frame"].rsplit(",", 2)[0][:8], str(row["layers"])) for row in rows})
    return summary


def _facts(errors: list[float]) -> dict[str, Any]:
    sizes = np.abs(errors)
    return {
        "n": len(errors), "within_5": float(np.mean(sizes <= 0.05)), "within_10": float(np.mean(sizes <= 0.10)),
        "median": float(np.median(sizes)), "p90": float(np.quantile(sizes, 0.9)), "max": float(sizes.max()),
        "bias": float(np.median(errors)),
    }  # fmt: skip


def _scatter(rows: list[dict[str, Any]], size: int = 520, margin: int = 50) -> str:
    """Predicted over measured on logarithmic axes, with the ±10 % band."""
    truth = np.array([row["ms"] for row in rows])
    guess = np.array([row["predicted_ms"] for row in rows])
    low, high = np.log10(min(truth.min(), guess.min()) * 0.8), np.log10(max(truth.max(), guess.max()) * 1.25)

    def place(ms: float) -> float:
        return float((np.log10(ms) - low) / (high - low) * (size - 2 * margin))

    def x(ms: float) -> float:
        return margin + place(ms)

    def y(ms: float) -> float:
        return size - margin - place(ms)

    ends = 10**low * 1.15, 10**high / 1.15
    lines = [
        f'<line x1="{x(ends[0]):.1f}" y1="{y(ends[0] * f):.1f}" x2="{x(ends[1]):.1f}" y2="{y(ends[1] * f):.1f}" '
        f'stroke="#999" stroke-dasharray="{dash}"/>'
        for f, dash in ((1.0, "0"), (1.1, "4"), (1 / 1.1, "4"))
    ]
    colours = dict(
        zip(sorted({f"{r['family']} {r['lowering']}" for r in rows}), ("#1b6ca8", "#d1603d", "#3a7d44", "#8a4fa3") * 4,
            strict=False)
    )  # fmt: skip
    dots = [
        f'<circle cx="{x(r["ms"]):.1f}" cy="{y(r["predicted_ms"]):.1f}" r="2.5" fill-opacity="0.6" '
        f'fill="{colours[r["family"] + " " + r["lowering"]]}"/>'
        for r in rows
    ]
    ticks = []
    for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if low <= np.log10(tick) <= high:
            ticks.append(f'<text x="{x(tick):.1f}" y="{size - margin + 16}" text-anchor="middle">{tick:g}</text>')
            ticks.append(f'<text x="{margin - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    legend = [
        f'<text x="{margin + 10}" y="{margin + 16 * i}" fill="{colour}">{name}</text>'
        for i, (name, colour) in enumerate(colours.items())
    ]
    labels = [
        f'<text x="{size / 2}" y="{size - 10}" text-anchor="middle">ms, truth</text>',
        f'<text x="14" y="{size / 2}" text-anchor="middle" transform="rotate(-90 14 {size / 2})">ms, predicted</text>',
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" font-family="sans-serif" '
    body = "\n".join([*lines, *dots, *ticks, *legend, *labels])
    return f'{head}font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


if __name__ == "__main__":
    main()
