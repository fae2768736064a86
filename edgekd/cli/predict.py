"""`edgekd predict`: the latency of a model folder from a latency table, without running anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd import host
from edgekd.cli.common import finish, output_options, start


@click.command(short_help="Predict a latency from a table.")
@click.argument("model", metavar="MODEL")
@click.option("--target", default="local", show_default=True, help="Target whose table is asked.")
@click.option("--table", type=click.Path(dir_okay=False, path_type=Path), help="Table [default: profiles/TARGET.json].")
@click.option("--lowering", help="Form of the artifact [default: all the table has].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Examples per inference.")
@click.option("--sequence", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens per example.")
@output_options
def command(
    model: str,
    target: str,
    table: Path | None,
    lowering: str | None,
    batch: int,
    sequence: int,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Predict the median latency of MODEL on a target from its latency table; nothing is run.

    \b
    In:   a model folder (of an encoder also a student made by a stage); a table of `edgekd calibrate`
    Out:  milliseconds, the error to expect, and what lies outside of what was measured

    \b
    Example:
      edgekd predict student --target npu-qualcomm-qcs9100 --sequence 64
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    from edgekd.calibrate.bodies import body_of
    from edgekd.errors import ModelError, RecipeError, unknown
    from edgekd.latency.table import find_table, load
    from edgekd.student import local_folder
    from edgekd.target import load_target

    if target.endswith((".yaml", ".yml")) or "/" in target:
        target = load_target(target).name
    path = table or find_table(target)
    if path is None:
        raise ModelError(f"there is no latency table of {target}; make one with `edgekd calibrate --target {target}`")
    known = load(path)
    covered = {cell.frame.lowering for cell in known.cells}
    if lowering is not None and covered and lowering not in covered:
        raise RecipeError(unknown(f"lowering in {path}:", lowering, covered))
    body = body_of(local_folder(model))
    arch = body.student.arch
    forms = [lowering] if lowering else sorted({c.frame.lowering for c in known.cells if c.frame.family == arch.family})
    tokens = sequence if body.image is None else body.tokens
    rows: list[dict[str, Any]] = []
    gaps: list[ModelError] = []
    for form in forms or ["fp32"]:
        try:
            found = known.predict(arch, lowering=form, batch=batch, sequence=tokens, outline=body.outline)
        except ModelError as error:
            gaps.append(error)
            continue
        rows.append({"lowering": form, **vars(found), "extrapolates": list(found.extrapolates)})
    if not rows:
        raise gaps[0]
    own = known.conditions
    result = {
        "model": model, "target": own.target, "table": str(path), "batch": batch, "sequence": tokens,
        "conditions": {"kind": own.kind, "cpu": own.cpu, "runtime": own.runtime, "threads": own.threads,
                       "date": own.date, "options": dict(own.options), "caveat": own.caveat},
        "not_covered": [str(error) for error in gaps], "predictions": rows,
    }  # fmt: skip
    finish(result, as_json=as_json, text=lambda: _print(result, arch.describe()))


def _print(result: dict[str, Any], shape: str) -> None:
    tokens = f", {result['sequence']} tokens" if result["sequence"] else ""
    click.echo(f"{result['model']} ({shape}) on {result['target']}, batch {result['batch']}{tokens}:")
    own = result["conditions"]
    where = f"on {own['cpu']}, {own['threads']} thread{'s'[: own['threads'] != 1]}, " if own["cpu"] else ""
    click.echo(f"from {result['table']}, made {where}with {own['runtime']}, {own['date'] or 'date unknown'}")
    if own["cpu"] and own["cpu"] != host.cpu_name():
        click.echo(f"note: this machine has another CPU ({host.cpu_name()})")
    for row in result["predictions"]:
        basis = "measurements" if row["basis"] == "measured" else "the vendor's estimates"
        error = f", 90 % of held-out models were within {row['error']:.1%}" if row["error"] is not None else ""
        click.echo(f"  {row['lowering']}: {row['ms']:.4g} ms PREDICTED from {basis}{error}")
        for text in row["extrapolates"]:
            click.echo(f"    extrapolated, the error does not hold: {text}")
    for text in result["not_covered"]:
        click.echo(f"  {text}")
    if own["caveat"]:
        click.echo(own["caveat"])
