"""`edgekd evaluate`: the metric of what is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import data_options, data_section, finish, output_options, start


@click.command(short_help="Metric of a bundle's ONNX artifact on data.")
@click.argument("bundle", type=click.Path(path_type=Path))
@data_options
@output_options
def command(bundle: Path, as_json: bool, quiet: bool, verbose: bool, **settings: Any) -> None:
    """Score the ONNX artifact of BUNDLE on labelled data, with a 95 % interval.

    In: a bundle, data (its test split, else validation, else all rows). Out: the metric.

    \b
    Example:
      edgekd evaluate runs/movies/bundle --data data/movies
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    if settings["data"] is None:
        raise click.UsageError("give --data: what to evaluate on")
    section = data_section(settings)
    max_length = section.pop("max_length", None)
    from edgekd.data import DataSpec
    from edgekd.pipeline.evaluate import evaluate

    result = evaluate(bundle, DataSpec(**section), max_length=max_length)
    low, high = result["ci95"]
    where = f"95 % interval {low:.4f}–{high:.4f}, n={result['n']}, {result['split']}"
    left = f"; {result['unlabelled']} without a label do not count" if "unlabelled" in result else ""
    line = f"{result['metric']} {result['value']:.4f} ({where}{left})"
    finish(result, as_json=as_json, text=lambda: click.echo(line))
