"""`edgekd calibrate`: measure a latency table of a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.cli.common import FiniteRange, finish, output_options, start

if TYPE_CHECKING:
    from edgekd.latency.table import LatencyTable

DEFAULT_BODIES = ("bert-384",)


def _parse_shapes(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    shapes = []
    for pair in pairs:
        batch, _, tokens = pair.partition("x")
        if not (batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
            raise click.BadParameter(f"{pair!r}: expected BATCHxTOKENS, for instance 1x64")
        shapes.append((int(batch), int(tokens)))
    return tuple(shapes)


@click.command(short_help="Measure a latency table of a target.")
@click.option("--target", default="local", show_default=True, help="Target: a name or a YAML file.")
@click.option("--body", "bodies", multiple=True, metavar="NAME|DIR",
              help="Standard body (see below) or a model folder; repeat for several [default: bert-384].")  # fmt: skip
@click.option("--lowering", "lowerings", multiple=True, metavar="NAME",
              help="Form of the models; repeat for several [default: what the target would ship].")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="BATCHxTOKENS", callback=_parse_shapes,
              help="Repeat for several [default: 1x32 1x64 1x128; images: the batch counts].")  # fmt: skip
@click.option("--minutes", type=FiniteRange(min=0, min_open=True), help="Stop after so long; call again to go on.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: the target's].")
@click.option("--mixed", type=click.IntRange(min=0), default=12, show_default=True,
              help="Random models that go into each fit.")  # fmt: skip
@click.option("--held-out", type=click.IntRange(min=0), default=4, show_default=True,
              help="Random models that judge each fit.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random models.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path),
              help="Table to write or go on with [default: profiles/TARGET.json].")  # fmt: skip
@click.option("--models", type=click.Path(file_okay=False, path_type=Path),
              help="Folder that keeps models built for a compiler, for the next target of the same form.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Begin anew instead of going on.")
@output_options
def command(
    target: str,
    bodies: tuple[str, ...],
    lowerings: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...],
    minutes: float | None,
    threads: int | None,
    out: Path | None,
    fresh: bool,
    models: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **counts: int,
) -> None:
    """Build and time models of many shapes on a target, so that any other shape's latency can be predicted.

    \b
    In:   a target; bodies: full-size models whose students are of interest
    Out:  profiles/TARGET.json with all points, the fitted costs and the error on models held out

    A vendor's compiler takes the place of measuring where the target is known by estimates only. Standard bodies:
    bert-128, bert-256, bert-384, bert-512, bert-768, vit-192-96, vit-192-224, vit-384-96, vit-384-224 (hidden size,
    image side), resnet-18-64.

    \b
    Example:
      edgekd calibrate --target local --body bert-384 --threads 1 --minutes 10 --out mine.json
    """
    progress = start(as_json=as_json, quiet=quiet, verbose=verbose)
    from edgekd.calibrate.run import Plan, calibrate
    from edgekd.target import load_target, probe

    device = probe(load_target(target))
    plan = Plan(
        bodies=bodies or DEFAULT_BODIES,
        lowerings=lowerings or _usual(device.forms),
        shapes=shapes or ((1, 32), (1, 64), (1, 128)),
        **counts,
    )
    path = out or Path("profiles") / f"{device.name}.json"
    table = calibrate(
        device, plan, path, threads=threads, minutes=minutes, fresh=fresh, models=models, progress=progress
    )
    result = {"table": str(path), "points": len(table.points), "cells": len(table.cells), "held_out": table.held_out}
    finish(result, as_json=as_json, text=lambda: print_table(path, table))


def _usual(forms: tuple[str, ...]) -> tuple[str, ...]:
    """The float and the integer form that would ship: the lean ones on a CPU, else the first."""
    usual = tuple(name for name in ("fp32_lean", "int8_dynamic_lean") if name in forms)
    return usual or forms[:1]


def print_table(path: Path, table: LatencyTable) -> None:
    """Print what a table holds and how well it predicts."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    own = table.conditions
    where = f" on {own.cpu}, {own.threads} threads" if own.cpu else ""
    size = f"{len(table.points)} points, {len(table.cells)} cells"
    head = f"{path}: {own.target}, {own.kind.replace('_', ' ')}{where}; {size}"
    console.print(head, soft_wrap=True, markup=False)
    rows = Table("held out", "n", "within 5 %", "within 10 %", "median", "p90", box=None, header_style="bold",
                 pad_edge=False)  # fmt: skip
    groups: dict[str, Any] = {**table.held_out.get("groups", {}), "all": table.held_out}
    for name, facts in groups.items():
        if facts.get("n"):
            figures = [f"{facts[key]:.1%}" for key in ("within_5", "within_10", "median", "p90")]
            rows.add_row(name, str(facts["n"]), *figures)
    console.print(rows)
    if own.caveat:
        console.print(own.caveat, soft_wrap=True, markup=False)
