"""A profile as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgekd.report.profile import KINDS, PERCENTILES, bounds, figure
from edgekd.report.terminal import COLOURS

OPERATORS_SHOWN = 20


def show_profile(document: Mapping[str, Any]) -> None:
    """Print the tables, the remarks, the comparison and the verdict of a profile's JSON."""
    console, latency = Console(highlight=False), document["latency"][0]
    console.print(escape(heading(document)), soft_wrap=True)
    if latency["kind"] == "vendor_estimate":
        _show_estimate(console, document)
    elif latency["kind"] != "unavailable":
        _show_measured(console, document)
    for axis, rows in (("batch", document.get("batches")), ("sequence", document.get("sequences"))):
        if rows:
            _show_sweep(console, axis, rows)
    if document.get("operators"):
        console.print(_operators(document["operators"]))
    if document.get("placement"):
        console.print(_placement(document["placement"]))
    for note in latency.get("notes", ()):
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if document.get("comparison"):
        console.print(escape(document["comparison"]["conclusion"]), soft_wrap=True, style="bold")
    for verdict in document["verdict"]:
        colour = COLOURS[verdict["status"]]
        line = f"[{colour}]{verdict['status'].upper()}[/{colour}]: {escape(verdict['reason'])}"
        console.print(line, soft_wrap=True, style="bold")


def heading(document: Mapping[str, Any]) -> str:
    """The model, the target and the conditions in one line."""
    latency = document["latency"][0]
    where = f"{document['model']} on {latency['target']}"
    if latency["kind"] == "unavailable":
        return f"{where}: unavailable. {latency['reason']}"
    shape = f"batch {latency['batch']}" + (f", {latency['sequence']} tokens" if latency["sequence"] else "")
    if latency["kind"] != "measured":
        return f"{where}: {shape}. {KINDS[latency['kind']]}"
    count = latency["threads"]
    return f"{where}: {shape}, {count} thread{'s' if count != 1 else ''}, n={latency['n']}"


def _show_measured(console: Console, document: Mapping[str, Any]) -> None:
    latency, comparison = document["latency"][0], document.get("comparison")
    table = _table("", "ms", "95 % interval")
    for name, key, ends in PERCENTILES:
        table.add_row(name, figure(latency[key]), bounds(latency.get(ends)))
    if comparison is not None:
        other = comparison["a"]["latency"]
        table.add_row("baseline p50", figure(other["p50_ms"]), bounds(other["ci95_ms"]))
        table.add_row("baseline p95", figure(other["p95_ms"]), bounds(other["p95_ci95_ms"]))
        table.add_row("speedup", f"{latency['speedup']:.3g}×", bounds(latency["speedup_ci95"]))
    console.print(table)
    console.print(_facts(latency), soft_wrap=True)
    if comparison is not None:
        console.print(escape(f"A {comparison['a']['model']}\nB {comparison['b']['model']}"), soft_wrap=True)


def _facts(latency: Mapping[str, Any]) -> str:
    low, high = latency["ci95_ms"]
    parts = [
        f"load {figure(latency['load_ms'])} ms",
        f"first inference {figure(latency['first_ms'])} ms",
        f"peak memory {latency['peak_rss_mb']:.0f} MiB" if latency["peak_rss_mb"] else "",
        f"{latency['throughput']:.4g} examples/s" if latency["throughput"] else "",
        f"noise of p50 ±{(high - low) / 2 / latency['p50_ms']:.1%}" if None not in (low, high) else "",
    ]
    return " · ".join(part for part in parts if part)


def _show_estimate(console: Console, document: Mapping[str, Any]) -> None:
    latency, stated = document["latency"][0], document["estimate"]
    ends = (stated["low_ms"], stated["high_ms"])
    table = _table("", "", "the vendor's bounds" if None not in ends else "")
    table.add_row("VENDOR ESTIMATE", f"{figure(latency['p50_ms'])} ms", bounds(ends) if None not in ends else "")
    if stated["cycles"] is not None:
        table.add_row("cycles", f"{stated['cycles']:,.0f}", "")
    if latency["speedup"]:
        table.add_row("estimate of the baseline", f"{figure(latency['teacher_p50_ms'])} ms", "")
        table.add_row("speedup by estimates", f"{latency['speedup']:.3g}×", "")
    for name, value in stated["figures"].items():
        table.add_row(escape(name), f"{value:.6g}", "")
    console.print(table)
    options = ", ".join(f"{key}={value}" for key, value in stated["options"].items())
    if options:
        console.print(escape(f"made with {options}"), soft_wrap=True)
    if stated["files"]:
        console.print(escape(f"kept: {', '.join(stated['files'])}"), soft_wrap=True)


def _show_sweep(console: Console, axis: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = _table(axis, "p50 ms", "95 % interval", "p95 ms", "examples/s", "95 % interval")
    for row in rows:
        if "reason" not in row:
            table.add_row(
                str(row[axis]), figure(row["p50_ms"]), bounds(row["ci95_ms"]), figure(row["p95_ms"]),
                figure(row["throughput"]), bounds(row["throughput_ci95"]),
            )  # fmt: skip
    if table.rows:
        console.print(table)
    for row in rows:
        if "reason" in row:
            console.print(escape(f"{axis} {row[axis]}: no figure. {row['reason']}"), soft_wrap=True)


def _operators(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("operator", "provider", "calls", "ms", "share")
    for row in rows[:OPERATORS_SHOWN]:
        ms, share = row["ms"], row["share"]
        table.add_row(
            escape(row["type"]), escape(_short(row["provider"])), f"{row['calls']:g}",
            "–" if ms is None else f"{ms:.4f}", "–" if share is None else f"{share:.1%}",
        )  # fmt: skip
    if rest := rows[OPERATORS_SHOWN:]:
        known = [row["share"] for row in rest if row["share"] is not None]
        share = f"{sum(known):.1%}" if len(known) == len(rest) else "–"
        table.add_row(f"{len(rest)} more", "", f"{sum(row['calls'] for row in rest):g}", "", share)
    return table


def _placement(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("provider", "nodes", "of nodes", "of time")
    for row in rows:
        time = "–" if row["time_share"] is None else f"{row['time_share']:.1%}"
        table.add_row(escape(_short(row["provider"])), f"{row['nodes']:g}", f"{row['node_share']:.1%}", time)
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
    return table


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")
