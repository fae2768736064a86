"""`edgekd compress`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import (
    FiniteRange,
    budget_options,
    budget_section,
    data_options,
    data_section,
    finish,
    output_options,
    start,
)


@click.command(short_help="Teacher, data, device and budget in; deployable ONNX bundle out.")
@click.argument("teacher", required=False)
@click.option("--recipe", metavar="FILE", help="A recipe file or preset instead of the options below.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key, e.g. stages.distill.epochs=3."
)
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Device(s) to build for [default: local].")
@click.option("--preset", metavar="NAME", help="balanced (default), fast, accurate or small.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder.")
@budget_options
@click.option("--size-mb", type=FiniteRange(min=0, min_open=True), help="Budget: size of the ONNX file.")
@click.option("--max-drop", "accuracy_drop", type=FiniteRange(0, 1), help="Floor: metric lost at most, e.g. 0.02.")
@click.option("--min-accuracy", type=FiniteRange(0, 1), help="Floor: metric at least.")
@data_options
@click.option("--seed", type=click.IntRange(min=0), help="Seed [default: 0].")
@click.option("--resume/--fresh", "resume", default=True, help="Go on with what is in --out (default), or start anew.")
@output_options
def command(
    teacher: str | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    targets: tuple[str, ...],
    preset: str | None,
    out: Path,
    seed: int | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Compress TEACHER (a Hugging Face folder or hub id) for a device, under a latency budget.

    In: teacher, data, target, budget. Out: OUT/bundle (ONNX, config, tokenizer, model card, edgekd.json),
    OUT/report.html and one folder per stage.

    \b
    Examples:
      edgekd compress teachers/movies --data data/movies --target local --speedup 4 --out runs/movies
      edgekd compress --recipe recipe.yaml --set budget.speedup=6 --out runs/movies6

    Exit codes: 0 budget met, 3 missed, 4 accuracy floor missed, 5 too close to tell, 2 wrong input.
    """
    progress = start(as_json=as_json, quiet=quiet, verbose=verbose)
    from edgekd.recipe import load_recipe

    if recipe is not None and preset is not None:
        raise click.UsageError("give --recipe or --preset, not both")
    if recipe is None and (teacher is None or settings["data"] is None):
        raise click.UsageError("give TEACHER and --data, or --recipe FILE (`edgekd init` writes one)")
    values: dict[str, Any] = {"teacher": teacher, "seed": seed, "targets": list(targets) or None}
    values = {key: value for key, value in values.items() if value is not None}
    data, budget = data_section(settings), budget_section(settings)
    if data := {key: value for key, value in data.items() if value is not None}:
        values["data"] = data
    if budget:
        values["budget"] = budget
    chosen = load_recipe(recipe or preset or "balanced", overrides, values)
    from edgekd.pipeline.compress import compress
    from edgekd.report.terminal import show

    result = compress(chosen, out, fresh=not resume, progress=progress)
    progress.stop()
    answer = result.to_dict()

    def text() -> None:
        show(result.manifests, answer["verdict"])
        for bundle in result.bundles.values():
            click.echo(f"bundle: {bundle}")
        click.echo(f"report: {result.folder / 'report.html'}")

    finish(answer, as_json=as_json, text=text)
    raise SystemExit(result.exit_code)
