"""`edgekd finetune`: make a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import FiniteRange, data_options, data_section, finish, output_options, parse_settings, start

HELP = """Train BASE on labelled data: the teacher for `edgekd compress`.

In: a Hugging Face folder or hub id, with any head or none; or, for images, a small random model sized to them:
scratch:vit, scratch:vit-small, scratch:resnet, scratch:resnet-small. Out: a folder that transformers loads.

\b
Examples:
  edgekd finetune google-bert/bert-base-uncased --data data/movies --out teachers/movies
  edgekd finetune scratch:vit --data data/fashion --augment shift_flip --epochs 10 --out teachers/fashion
"""


@click.command(short_help="Make a teacher from a base model and labelled data.", help=HELP)
@click.argument("base")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the teacher.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the data [default: 3].")
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples of one batch [default: 32].")
@click.option(
    "--learning-rate",
    type=FiniteRange(min=0, min_open=True),
    help="Largest learning rate [default: 5e-5, or 1e-3 from scratch].",
)
@click.option(
    "--augment",
    type=click.Choice(["none", "shift", "shift_flip"]),
    help="Move images at random, or mirror them too [default: none].",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another setting, e.g. ema=0.99.")
@data_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed.")
@output_options
def command(
    base: str,
    out: Path,
    overrides: tuple[str, ...],
    seed: int,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    epochs: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    augment: str | None,
    **options: Any,
) -> None:
    """Train a teacher."""
    progress = start(as_json=as_json, quiet=quiet, verbose=verbose)
    if options["data"] is None:
        raise click.UsageError("give --data: labelled examples to train on")
    section = data_section(options)
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "augment": augment,
        "max_length": section.pop("max_length", None),
    }
    named, more = {key: value for key, value in given.items() if value is not None}, parse_settings(overrides)
    if twice := sorted(named.keys() & more.keys()):
        raise click.UsageError(f"{', '.join(twice)} is given twice, by --set and by an option of its own")
    chosen = {**named, **more}
    from edgekd.data import DataSpec
    from edgekd.distill.finetune import finetune, finetune_settings

    result = finetune(
        base, DataSpec(**section, seed=seed), out, settings=finetune_settings(chosen), seed=seed, progress=progress
    )
    progress.stop()
    scores = ", ".join(f"{result[split]:.4f} on {split}" for split in ("validation", "test") if split in result)
    finish(result, as_json=as_json, text=lambda: click.echo(f"{result['folder']}: {result['metric']} {scores}"))
