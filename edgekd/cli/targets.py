"""`edgekd targets`: the devices that can be built for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import finish, output_options, start
from edgekd.target import Target, list_targets, load_target, probe


@click.group(invoke_without_command=True)
@output_options
@click.pass_context
def command(ctx: click.Context, as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the targets, show one, or check a target file.

    \b
    In:   nothing, the name of a target, or a YAML file
    Out:  a table, the facts of one target as they apply here, or the mistakes of the file

    \b
    Example:
      edgekd targets show local
    """
    options = {"as_json": as_json, "quiet": quiet, "verbose": verbose}
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_command, **options)
        return
    # What is given before the name of the subcommand holds for it as well.
    ctx.default_map = {name: {key: value for key, value in options.items() if value} for name in command.commands}


@command.command("list")
@output_options
def list_command(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the targets of ./targets and the shipped ones, and how their latency is known from here.

    It is measured, or the estimate of the vendor's compiler, or unavailable, with the reason.

    \b
    Example:
      edgekd targets list
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    rows = [_row(load_target(name)) for name in list_targets()]
    finish({"targets": rows}, as_json=as_json, text=lambda: _print_rows(rows))


@command.command("show")
@click.argument("name")
@output_options
def show_command(name: str, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Show what target NAME is, with everything that is probed filled in.

    \b
    Example:
      edgekd targets show local --json
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    target = probe(load_target(name))
    facts = {**target.to_dict(), "forms": target.forms, **_reachable(target), **_host_facts()}
    finish(facts, as_json=as_json, text=lambda: _print_facts(facts))


@command.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@output_options
def check_command(file: Path, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Check the target FILE: all mistakes with their lines, exit code 2 if there are any.

    \b
    Example:
      edgekd targets check targets/my-board.yaml
    """
    from edgekd.devices import device_of, is_estimated

    start(as_json=as_json, quiet=quiet, verbose=verbose)
    target = load_target(str(file.resolve()) if file.exists() else str(file))
    if not is_estimated(target):
        device_of(target)
    result = {"name": target.name, "valid": True, **_reachable(target)}
    line = f"{file}: target {target.name!r} is valid; latency: {_said(result)}"
    finish(result, as_json=as_json, text=lambda: click.echo(line))


def _row(target: Target) -> dict[str, Any]:
    target = probe(target)
    keys = ("name", "title", "device", "runtime", "precisions", "fast_precisions")
    return {**{key: target.to_dict()[key] for key in keys}, **_reachable(target)}


def _reachable(target: Target) -> dict[str, Any]:
    """How the latency is known from here: `measured`, `vendor_estimate` or `unavailable` with the reason."""
    from edgekd.devices import is_estimated, unavailable

    if reason := unavailable(target):
        return {"available": False, "latency": "unavailable", "reason": reason}
    return {"available": True, "latency": "vendor_estimate" if is_estimated(target) else "measured"}


def _said(row: dict[str, Any]) -> str:
    return str(row["latency"]).replace("_", " ") + (f": {row['reason']}" if "reason" in row else "")


def _host_facts() -> dict[str, Any]:
    from edgekd import host
    from edgekd.devices.ort import available_providers

    facts = {"cpu": host.cpu_name(), "cores": host.usable_cores(), "onnxruntime_providers": available_providers()}
    return {"host": facts}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """The table, and below it why some targets are unavailable: the reasons are too long for a column."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("target", "runtime", "precisions (fast ones *)", "latency from here"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        fast = [f"{name}*" if name in row["fast_precisions"] else name for name in row["precisions"]]
        table.add_row(row["name"], row["runtime"], " ".join(fast), str(row["latency"]).replace("_", " "))
    Console(markup=False).print(table)
    for row in rows:
        if "reason" in row:
            click.echo(f"{row['name']}: {row['reason']}")


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in {**facts, **facts.get("host", {})}.items():
        if key not in ("host", "lowerings", "available") and value not in ((), {}, None, ""):
            table.add_row(key, Text(_shown(value)))
    Console(highlight=False, markup=False).print(table)
