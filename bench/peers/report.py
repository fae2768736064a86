"""What the comparison found: rows as JSON and CSV, a picture, and a table in Markdown."""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from peers.picture import draw

RESULTS = Path(__file__).parents[1] / "results"
COLUMNS = (
    "name", "peer", "lengths", "threads", "accuracy", "retained", "speedup", "p50_ms", "p95_ms", "size_mb", "seconds",
    "failed",
)  # fmt: skip
TITLES = {
    "teacher": "teacher, fp32",
    "ort_fused": "ONNX Runtime, fused fp32",
    "ort_dynamic": "ONNX Runtime, dynamic int8",
    "ort_static": "ONNX Runtime, static int8",
    "ort_static_matmul": "ONNX Runtime, static int8, matrix products only",
    "openvino_float": "OpenVINO, float",
    "openvino_float_fixed": "OpenVINO, float, fixed shapes",
    "nncf": "NNCF, OpenVINO",
    "nncf_fixed": "NNCF, OpenVINO, fixed shapes",
    "olive_dynamic": "Olive, dynamic int8",
    "olive_static": "Olive, static int8",
    "inc_dynamic": "neural-compressor, dynamic int8",
    "inc_static": "neural-compressor, static int8",
    "kd_3": "half the layers, KD 3 epochs, dynamic int8",
    "kd_6": "half the layers, KD 6 epochs, dynamic int8",
}


class Entry(Protocol):
    """What a row needs to know of an artifact."""

    @property
    def name(self) -> str: ...

    @property
    def peer(self) -> str: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def size_bytes(self) -> int | None: ...

    def examples(self, lengths: str) -> Path: ...

    def logits(self, lengths: str) -> str: ...


def report(options: argparse.Namespace, entries: Sequence[Entry]) -> None:
    """Write all files and print the table of every condition."""
    rows = []
    pictures = 0
    RESULTS.mkdir(exist_ok=True)
    for threads in options.threads:
        for lengths in options.lengths:
            own = list(rows_of(options, entries, lengths, threads))
            rows += own
            print(f"\n{lengths}, {threads or 'all'} threads\n\n{markdown(own)}")
            if any(row.get("speedup") for row in own):
                suffix = "" if not pictures else f"-{lengths}-{threads}"
                picture = draw(own, across="speedup over the fp32 teacher", up="accuracy retained, %")
                (RESULTS / f"pareto-{options.name}{suffix}.svg").write_text(picture, encoding="utf-8")
                pictures += 1
    facts = {
        "command": " ".join(["python bench/pareto.py", *(Path(word).name for word in sys.argv[1:])]),
        "python": platform.python_version(),
        "calibration": options.calibration,
        "sequence": options.sequence,
        "measurements": {
            f"{lengths}-{threads}": {key: told[key] for key in ("host", "picked", "preemptions") if key in told}
            for threads in options.threads
            for lengths in options.lengths
            if (told := read(options.work / "times" / f"{lengths}-{threads}.json"))
        },
        "rows": rows,
    }
    stem = RESULTS / f"pareto-{options.name}"
    stem.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def rows_of(
    options: argparse.Namespace, entries: Sequence[Entry], lengths: str, threads: int
) -> Iterator[dict[str, Any]]:
    """One row for every artifact; what is not known of one is left out."""
    times, told = samples_of(options, lengths, threads)
    teacher = hits_of(options, entries[0], lengths)
    for each in entries:
        size = each.size_bytes
        scored = read((options.work / "logits" / each.logits(lengths)).with_suffix(".json"))
        ran = {**scored.get("failed", {}), **told.get("failed", {})}
        row = {
            "name": each.name,
            "title": TITLES.get(each.name) or title_of(each),
            "peer": each.peer,
            "lengths": lengths,
            "threads": threads,
            "fixed_shapes": bool(each.facts.get("fixed")),
            "size_mb": None if size is None else round(size / 1e6, 2),
            "seconds": each.facts.get("seconds"),
            "failed": each.facts.get("failed") or ran.get(each.name),
            "settings": each.facts.get("settings", {}),
            "versions": each.facts.get("versions", {}),
            "runtime": told.get("facts", {}).get(each.name) or scored.get("facts", {}).get(each.name),
        }
        hits = hits_of(options, each, lengths)
        if hits is not None and teacher is not None:
            row |= quality(hits, teacher)
        if each.name in times and "teacher" in times:
            row |= latency(times[each.name], times["teacher"], lengths)
        yield row


def title_of(each: Entry) -> str:
    """What edgekd was asked for, and where that was run."""
    budget = each.facts.get("settings", {}).get("budget") or {}
    asked = f", budget {budget['speedup']:g}×" if budget.get("speedup") else f" {each.name.removeprefix('edgekd_')}"
    return f"edgekd{asked}" + (", OpenVINO" if each.facts.get("engine") == "openvino" else "")


def hits_of(options: argparse.Namespace, each: Entry, lengths: str) -> Any:
    """Which test examples an artifact gets right [N]; None where it was not scored."""
    file = options.work / "logits" / each.logits(lengths)
    if not file.is_file():
        return None
    with np.load(file) as archive, np.load(each.examples(lengths)) as inputs:
        if each.name not in archive.files:
            return None
        from edgekd.tasks import correct

        return correct(archive[each.name], inputs["labels"])


def quality(hits: Any, teacher: Any) -> dict[str, Any]:
    """Accuracy with Wilson's interval, and the difference to the teacher with McNemar's."""
    from edgekd.pipeline.sides import paired_interval
    from edgekd.tasks import score_interval

    accuracy = float(hits.mean())
    return {
        "accuracy": accuracy,
        "accuracy_ci95": score_interval(hits),
        "n": len(hits),
        "retained": accuracy / float(teacher.mean()),
        "difference": accuracy - float(teacher.mean()),
        "difference_ci95": paired_interval(teacher, hits),
    }


def samples_of(options: argparse.Namespace, lengths: str, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Milliseconds [blocks, examples] by artifact, and what was noted beside; empty where nothing was measured."""
    file = options.work / "times" / f"{lengths}-{threads}.npz"
    if not file.is_file():
        return {}, {}
    with np.load(file) as archive:
        return {name: archive[name] for name in archive.files}, read(file.with_suffix(".json"))


def latency(own: Any, teacher: Any, lengths: str) -> dict[str, Any]:
    """Percentiles over all inferences, and the speedup: of medians, or for data of the mean of a block."""
    from edgekd.latency.stats import Samples, summarize

    def samples(ms: Any) -> Samples:
        blocks, examples = ms.shape
        return Samples(name="", ms=ms.ravel(), block=np.repeat(np.arange(blocks), examples))

    def means(ms: Any) -> Samples:
        return samples(ms.mean(axis=1, keepdims=True))

    single = summarize(samples(own), target="local", baseline=samples(teacher))
    ratio = summarize(means(own), target="local", baseline=means(teacher)) if lengths == "data" else single
    return {
        "p50_ms": single.p50_ms, "p50_ci95_ms": single.ci95_ms, "p95_ms": single.p95_ms, "mean_ms": single.mean_ms,
        "speedup": ratio.speedup, "speedup_ci95": ratio.speedup_ci95, "inferences": single.n,
    }  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people, the fastest last; failed ones at the end with their reasons."""
    lines = [
        "| | accuracy | difference to the teacher | speedup | p50 ms | p95 ms | MB | made in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (bool(row["failed"]), row.get("speedup") or 0.0)):
        if row["failed"]:
            lines.append(f"| {row['title']} | failed: {row['failed'].replace('|', '/')} | | | | | | |")
            continue
        cells = [row["title"], "", "", "", "", "", f"{row['size_mb']:.1f}", duration(row["seconds"])]
        if "accuracy" in row:
            low, high = row["accuracy_ci95"]
            cells[1] = f"{100 * row['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            if row["peer"] != "teacher":
                low, high = row["difference_ci95"]
                cells[2] = f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        if "speedup" in row:
            low, high = row["speedup_ci95"]
            cells[3] = "1" if row["peer"] == "teacher" else f"{row['speedup']:.2f}× [{low:.2f}, {high:.2f}]"
            cells[4], cells[5] = f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def duration(seconds: float | None) -> str:
    """Seconds or minutes, as short as they can be told."""
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def read(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
