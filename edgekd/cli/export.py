"""`edgekd export`: a student folder as a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgekd.cli.common import data_options, data_section, finish, output_options, start


@click.command(short_help="Turn a student folder into a bundle for a device.")
@click.argument("student", metavar="STUDENT")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder.")
@click.option("--target", default="local", show_default=True, help="Device to build for.")
@click.option("--batch", type=click.IntRange(min=1), help="Examples per inference [default: the target's, else 1].")
@click.option("--sequence", type=click.IntRange(min=1), help="Tokens per example [default: the target's, else 64].")
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: the target's].")
@data_options
@output_options
def command(
    student: str,
    out: Path,
    target: str,
    batch: int | None,
    sequence: int | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Write STUDENT (a model folder, plain or made by a stage) as a bundle for a target, checked against torch.

    In: a model folder; with --data also the metric. Out: a bundle folder in the target's form: ONNX, for Ethos-U
    TFLite; where the target needs fixed shapes, those of --batch and --sequence.

    \b
    Examples:
      edgekd export quantized --data data/movies --out bundle
      edgekd export distilled --data data/movies --target npu-qualcomm-qcs9100 --out bundle-qcs9100
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    section = data_section(settings)
    section.pop("max_length", None)
    from edgekd.constraints import budget_of, require
    from edgekd.data import DataSpec
    from edgekd.target import load_target, probe

    data = DataSpec(**section) if section.get("path") else None
    device = probe(load_target(target))
    budget = budget_of(device, {"batch": batch, "sequence": sequence, "threads": threads})
    require(device, budget, {})
    from edgekd.pipeline.export import export

    manifest = export(student, out, target=device, budget=budget, data=data)
    artifact, [latency] = manifest["artifact"], manifest["latency"]
    form = f"{artifact['lowering']} {'ONNX' if artifact['file'].endswith('.onnx') else 'TFLite'}"
    lines = [f"{out}: {form}, {artifact['size_bytes'] / 1e6:.2f} MB, {artifact['shape']}", said(latency)]
    finish(manifest, as_json=as_json, text=lambda: click.echo("\n".join(lines)))


def said(latency: Mapping[str, Any]) -> str:
    """One line on the latency, which says what kind of figure it is."""
    if latency["kind"] == "unavailable":
        return f"latency on {latency['target']}: unavailable ({latency['reason']})"
    kind = latency["kind"].replace("_", " ")
    notes = f" ({latency['notes'][0]})" if latency["kind"] == "vendor_estimate" and latency.get("notes") else ""
    return f"latency on {latency['target']}: {kind} {latency['p50_ms']:.3f} ms{notes}"
