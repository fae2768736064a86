"""`edgekd parity`: a student folder and an artifact of it, compared down to the integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import data_options, data_section, finish, output_options, start


@click.command(short_help="Compare an artifact with its student, layer by layer.")
@click.argument("student", metavar="STUDENT|RUN")
@click.argument("artifact", metavar="[ARTIFACT]", type=click.Path(path_type=Path), required=False)
@click.option("--count", type=click.IntRange(min=1), default=256, show_default=True, help="At most so many examples.")
@data_options
@output_options
def command(
    student: str, artifact: Path | None, count: int, as_json: bool, quiet: bool, verbose: bool, **settings: Any
) -> None:
    """Compare ARTIFACT (an ONNX or TFLite file, or a bundle) with the STUDENT folder it was made from.

    In: a model folder and an artifact, or instead of both a finished RUN (its last student and its bundle); data.
    Out: agreement of predictions and metrics; for ONNX also whether weights and scales are those of training, and
    which layer first loses precision. Exit code 4 if weights or scales differ, or if too few predictions agree.

    \b
    Examples:
      edgekd parity runs/movies --data data/movies
      edgekd parity runs/movies/05-quantize runs/movies/bundle --data data/movies
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    if settings["data"] is None:
        raise click.UsageError("give --data: what to compare on")
    section = data_section(settings)
    max_length = section.pop("max_length", None)
    from edgekd.data import DataSpec
    from edgekd.pipeline.parity import of_run, parity

    source, artifact = of_run(Path(student)) if artifact is None else (student, artifact)
    result = parity(source, artifact, DataSpec(**section), max_length=max_length, count=count)
    finish(result, as_json=as_json, text=lambda: _print(result))
    if not result["ok"]:
        raise SystemExit(4)


def _print(result: dict[str, Any]) -> None:
    metric = result["metric"]
    both = f"{metric['name']} {metric['torch']:.4f} in torch, {metric['artifact']:.4f} here"
    click.echo(
        f"{result['agreement']:.1%} of {result['n']} predictions agree ({result['split']}), largest difference of "
        f"logits {result['max_abs']:.3g}; {both}"
    )
    for line in result["said"]:
        click.echo(line)
    if result["scales"] is None:
        click.echo("TFLite: its ranges are calibrated anew, so scales are not compared, nor are its layers")
