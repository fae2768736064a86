"""The result as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgekd.report.gains import gains, shared

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


HEADINGS = ("", "validation", "reported", "p50", "p95", "speedup", "size")


def rows(manifest: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells under `HEADINGS` for the teacher, each stage and the artifact."""
    teacher, artifact, quality = manifest["teacher"], manifest["artifact"], manifest["quality"]
    latency = manifest["latency"][0]
    first = ("", f"{teacher['value']:.4f}", _ms(latency.get("teacher_p50_ms")), "", "1.00×")
    form = "teacher (same form)" if latency["kind"] == "vendor_estimate" else "teacher (fp32)"
    table = [(form, *first, _mb(teacher["size_bytes"]))]
    for entry in manifest["ledger"]:
        validation = "" if entry["metric"] is None else f"{entry['metric']:.4f}"
        table.append(
            (
                f"  {entry['stage']}{_mark(entry)}",
                validation,
                "",
                *_timing(entry["latency"]),
                _mb(entry.get("size_bytes")),
            )
        )
    last = ("", f"{quality['value']:.4f}", *_timing(latency))
    return [*table, (f"artifact ({artifact['precision']})", *last, _mb(artifact["size_bytes"]))]


def _mark(entry: Mapping[str, Any]) -> str:
    """Marks a stage that was rolled back: the figures are those of what went on in its place."""
    return " ↩" if entry.get("kept") is False else ""


def heading(manifest: Mapping[str, Any], target: str) -> str:
    """What the table is about: target, conditions, metric."""
    quality, latency = manifest["quality"], manifest["latency"][0]
    where = f"batch {latency['batch']}" + (f", {latency['sequence']} tokens" if latency.get("sequence") else "")
    kept = "" if quality.get("retained") is None else f", {quality['retained']:.1%} of the teacher's kept"
    threads = f", {latency['threads']} thread(s)" if latency.get("threads") else ""
    notes = "".join(f"\n{note}" for note in latency.get("notes", ()) if latency["kind"] != "measured")
    return (
        f"{target}: {where}{threads}, latency {latency['kind'].replace('_', ' ')}{notes}\n"
        f"{quality['metric']} reported on {quality['split']} (n={quality['n']}){kept}"
    )


def show(manifests: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Print one table per target and the verdicts."""
    console = Console(highlight=False)
    for target, manifest in manifests.items():
        console.print(heading(manifest, target), soft_wrap=True, markup=False)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for index, name in enumerate(HEADINGS):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows(manifest):
            table.add_row(*row)
        console.print(table)
        for line in [*shared(manifest, len(manifests)), *(each["line"] for each in gains(manifest))]:
            console.print(line, soft_wrap=True, markup=False)
    for verdict in verdicts:
        colour = COLOURS[verdict["status"]]
        line = f"[{colour}]{verdict['status']}[/{colour}]  {verdict['target']}: {escape(verdict['reason'])}"
        console.print(line, soft_wrap=True)


def _timing(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return _ms(entry.get("p50_ms")), _ms(entry.get("p95_ms")), _times(entry.get("speedup"))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} ms"


def _mb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.2f} MB"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"
