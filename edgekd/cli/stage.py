"""What the commands of single stages share: `edgekd search|prune|quantize|… IN --data … --out OUT`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import (
    budget_options,
    budget_section,
    data_options,
    data_section,
    finish,
    output_options,
    parse_section,
    parse_settings,
    start,
)


def stage_command(name: str, short_help: str, text: str) -> click.Command:
    """Make the command of one stage; its settings are given as `--set key=value` and checked like a recipe's."""

    def run(
        model: str,
        teacher: str | None,
        target: str,
        overrides: tuple[str, ...],
        out: Path,
        lowering: str | None,
        operators: str | None,
        seed: int,
        as_json: bool,
        quiet: bool,
        verbose: bool,
        **settings: Any,
    ) -> None:
        progress = start(as_json=as_json, quiet=quiet, verbose=verbose)
        if settings["data"] is None:
            raise click.UsageError("give --data: the stage looks at examples")
        from edgekd.constraints import budget_of, require
        from edgekd.data import DataSpec
        from edgekd.errors import RecipeError, unknown
        from edgekd.operators import Operators
        from edgekd.quantize import Quantize
        from edgekd.stages import build_stage
        from edgekd.target import load_target, probe

        stage = build_stage(name, parse_settings(overrides))
        foreseen = None if operators is None else build_stage("operators", parse_section("--operators", operators))
        section = data_section(settings)
        max_length = section.pop("max_length", None)
        device = probe(load_target(target))
        lowering = lowering or Quantize().expected_on(device)
        if lowering not in device.forms:
            raise RecipeError(unknown(f"lowering on target {device.name}", lowering, device.forms))
        budget = budget_of(device, budget_section(settings))
        require(device, budget, {name: stage})
        if name == "search" and not budget.asks_latency:
            raise click.UsageError("give --speedup or --latency-p95-ms: search looks for a shape that meets it")
        if name == "distill" and teacher is None:
            raise click.UsageError("give --teacher: whose answers IN learns (IN itself teaches it nothing new)")
        from edgekd.pipeline.alone import Alone, run_alone

        asked = Alone(
            model=model,
            teacher=teacher,
            data=DataSpec(**section, seed=seed),
            target=device,
            budget=budget,
            lowering=lowering,
            max_length=max_length,
            seed=seed,
            operators=foreseen if isinstance(foreseen, Operators) else None,
        )
        result = run_alone(name, stage, asked, out, progress)
        progress.stop()
        finish(result, as_json=as_json, text=lambda: click.echo(f"{result['out']}: {result['shape']}"))

    run.__doc__ = text
    of_teacher = "The teacher." if name == "distill" else "The teacher [default: IN itself]."
    decorated: Callable[..., None] = run
    for decorator in reversed(
        (
            click.argument("model", metavar="IN"),
            click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the result."),
            click.option("--teacher", metavar="FOLDER", help=of_teacher),
            click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of the stage."),
            click.option("--target", default="local", show_default=True, help="Device."),
            budget_options,
            click.option(
                "--lowering",
                help="Form of the artifact to time (search and operators only) [default: what the target would ship].",
            ),
            click.option(
                "--operators",
                metavar="SETTINGS",
                help="An operators stage to come, as in a recipe, e.g. '{}' (search only).",
            ),
            data_options,
            click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed."),
            output_options,
        )
    ):
        decorated = decorator(decorated)
    return click.command(name, short_help=short_help)(decorated)
