"""`edgekd export`: a student folder as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import data_options, data_section, finish, output_options, start


@click.command(short_help="Turn a student folder into an ONNX bundle.")
@click.argument("student", metavar="STUDENT")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder.")
@click.option("--target", default="local", show_default=True, help="Device to measure on.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Examples per inference.")
@click.option("--sequence", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens per example.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: the target's].")
@data_options
@output_options
def command(
    student: str,
    out: Path,
    target: str,
    batch: int,
    sequence: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Write STUDENT (a model folder, plain or made by a stage) as an ONNX bundle, checked against torch.

    In: a model folder; with --data also the metric. Out: a bundle folder.

    \b
    Example:
      edgekd export quantized --data data/movies --out bundle
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    section = data_section(settings)
    section.pop("max_length", None)
    from edgekd.context import Budget
    from edgekd.data import DataSpec
    from edgekd.pipeline.export import export
    from edgekd.target import load_target, probe

    data = DataSpec(**section) if section.get("path") else None
    budget = Budget(batch=batch, sequence=sequence, threads=threads)
    manifest = export(student, out, target=probe(load_target(target)), budget=budget, data=data)
    artifact = manifest["artifact"]
    line = f"{out}: {artifact['precision']} ONNX, {artifact['size_bytes'] / 1e6:.2f} MB, {artifact['shape']}"
    finish(manifest, as_json=as_json, text=lambda: click.echo(line))
