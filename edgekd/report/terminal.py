"""The result as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def rows(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """(step, metric, p50, p95, speedup, size) for the teacher, each stage and the artifact."""
    teacher, artifact, quality = manifest["teacher"], manifest["artifact"], manifest["quality"]
    latency = manifest["latency"][0]
    table = [
        (
            "teacher (fp32)",
            f"{teacher['value']:.4f}",
            _ms(latency.get("teacher_p50_ms")),
            "",
            "1.00×",
            _mb(teacher["size_bytes"]),
        )
    ]
    for entry in manifest["ledger"]:
        seen = entry["latency"]
        validation = "" if entry["metric"] is None else f"{entry['metric']:.4f} (validation)"
        table.append(
            (
                f"  {entry['stage']}",
                validation,
                _ms(seen.get("p50_ms")),
                _ms(seen.get("p95_ms")),
                _times(seen.get("speedup")),
                _mb(entry.get("size_bytes")),
            )
        )
    retained = "" if quality.get("retained") is None else f" ({quality['retained']:.1%} kept)"
    table.append(
        (
            f"artifact ({artifact['precision']})",
            f"{quality['value']:.4f}{retained}",
            _ms(latency.get("p50_ms")),
            _ms(latency.get("p95_ms")),
            _times(latency.get("speedup")),
            _mb(artifact["size_bytes"]),
        )
    )
    return table


def show(manifests: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Print one table per target and the verdicts."""
    console = Console(highlight=False)
    for target, manifest in manifests.items():
        quality, latency = manifest["quality"], manifest["latency"][0]
        where = f"batch {latency['batch']}" + (f", {latency['sequence']} tokens" if latency.get("sequence") else "")
        table = Table(title=f"{target}: {where}, {latency.get('threads')} thread(s)", title_justify="left")
        table.add_column("")
        table.add_column(f"{quality['metric']} on {quality['split']} (n={quality['n']})")
        for name in ("p50", "p95", "speedup", "size"):
            table.add_column(name, justify="right")
        for row in rows(manifest):
            table.add_row(*row)
        console.print(table)
    for verdict in verdicts:
        colour = COLOURS[verdict["status"]]
        console.print(
            f"[{colour}]{verdict['status']}[/{colour}]  {verdict['target']}: {verdict['reason']}", soft_wrap=True
        )


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} ms"


def _mb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.2f} MB"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"
