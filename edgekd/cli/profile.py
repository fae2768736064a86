"""`edgekd profile`: the latency of any ONNX model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.cli.common import finish, output_options, start

if TYPE_CHECKING:
    from edgekd.devices import Operator
    from edgekd.latency.profiling import ProfileResult
    from edgekd.latency.stats import Interval, Samples


def _parse_shapes(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for pair in pairs:
        name, _, sizes = pair.partition("=")
        parts = sizes.split(",")
        if not name or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise click.BadParameter(f"{pair!r}: expected NAME=1,3,224,224")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", default="local", show_default=True, help="Target to measure on: a name or a YAML file.")
@click.option("--latency-p95-ms", type=click.FloatRange(min=0, min_open=True), help="Budget for p95 in milliseconds.")
@click.option("--speedup", type=click.FloatRange(min=0, min_open=True), help="Budget: times faster than --baseline.")
@click.option("--baseline", type=click.Path(path_type=Path), help="A second model, measured in turns with the first.")
@click.option("--batch", type=click.IntRange(min=1), help="Examples per inference [default: 1].")
@click.option("--sequence", type=click.IntRange(min=1), help="Tokens per example [default: 64].")
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: the target's; local: all cores].")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", callback=_parse_shapes,
              help="Shape of one input; repeat for several.")  # fmt: skip
@click.option("--feeds", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Inputs: an .npz by name.")
@click.option("--per-operator", is_flag=True, help="Also the time of each operator type.")
@click.option("--samples", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw samples to a CSV file.")
@output_options
def command(
    model: Path,
    baseline: Path | None,
    speedup: float | None,
    samples: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Measure the latency of MODEL on a target and compare it with a budget.

    \b
    In:   an .onnx file, a bundle, or a folder with model.onnx; no recipe needed
    Out:  percentiles with 95 % intervals, load time, memory; the verdict if a budget is given

    Exit code 0: budget met or none given; 3: missed, or the target is not there; 5: too close to tell.

    \b
    Example:
      edgekd profile runs/movies/bundle --target local --threads 1 --latency-p95-ms 4
    """
    if speedup is not None and baseline is None:
        raise click.UsageError("--speedup needs --baseline: the model to be faster than")
    progress = start(as_json=as_json, quiet=quiet, verbose=verbose)
    from edgekd.latency.profiling import profile
    from edgekd.latency.verdict import EXIT_CODES

    result = profile(model, baseline=baseline, speedup=speedup, say=progress.say, **settings)
    progress.stop()
    if samples is not None:
        write_samples(samples, result.samples)
    finish(result.to_dict(), as_json=as_json, text=lambda: print_result(result))
    if result.verdict is not None:
        raise SystemExit(EXIT_CODES[result.verdict.status])


def write_samples(path: Path, samples: tuple[Samples, ...]) -> None:
    """Write raw samples as CSV: model, block, milliseconds.

    Raises:
        StoreError: the file cannot be written.
    """
    import csv

    from edgekd.errors import StoreError

    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("model", "block", "ms"))
            for part in samples:
                writer.writerows((part.name, block, f"{ms:.6f}") for block, ms in zip(part.block, part.ms, strict=True))
    except OSError as error:
        raise StoreError(f"cannot write the samples to {path}: {error.strerror}") from None


def print_result(result: ProfileResult) -> None:
    """Print the tables, the remarks and the verdict."""
    from rich.console import Console

    console, measurement = Console(highlight=False), result.measurement
    shape = f"batch {measurement.batch}" + (f", {measurement.sequence} tokens" if measurement.sequence else "")
    if measurement.kind == "unavailable":
        console.print(f"{result.model} on {measurement.target}: unavailable. {measurement.reason}", soft_wrap=True)
    else:
        threads = f"{measurement.threads} thread{'s' if measurement.threads != 1 else ''}"
        console.print(f"{result.model} on {measurement.target}: {shape}, {threads}, n={measurement.n}", soft_wrap=True)
        console.print(_percentiles(result))
        console.print(_facts(result), soft_wrap=True)
    if result.operators:
        console.print(_operators(result.operators))
    for note in measurement.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if result.verdict is not None:
        console.print(f"{result.verdict.status.upper()}: {result.verdict.reason}", soft_wrap=True, style="bold")


def _percentiles(result: ProfileResult) -> Any:
    from rich.table import Table

    table = Table("", "ms", "95 % interval", box=None, header_style="bold", pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    facts = result.measurement
    rows = {
        "p50": (facts.p50_ms, facts.ci95_ms),
        "p90": (facts.p90_ms, facts.p90_ci95_ms),
        "p95": (facts.p95_ms, facts.p95_ci95_ms),
        "p99": (facts.p99_ms, facts.p99_ci95_ms),
        "mean": (facts.mean_ms, None),
        "min": (facts.min_ms, None),
    }
    for name, (value, interval) in rows.items():
        table.add_row(name, _figure(value), _bounds(interval))
    if facts.speedup is not None:
        table.add_row("baseline p50", _figure(facts.teacher_p50_ms), "")
        table.add_row("speedup", f"{facts.speedup:.3g}×", _bounds(facts.speedup_ci95))
    return table


def _facts(result: ProfileResult) -> str:
    facts = result.measurement
    low, high = facts.ci95_ms or (math.nan, math.nan)
    parts = [
        f"load {_figure(facts.load_ms)} ms",
        f"first inference {_figure(facts.first_ms)} ms",
        f"peak memory {facts.peak_rss_mb:.0f} MiB" if facts.peak_rss_mb else "",
        f"{facts.throughput:.4g} examples/s" if facts.throughput else "",
        f"noise of p50 ±{(high - low) / 2 / (facts.p50_ms or math.nan):.1%}",
    ]
    return " · ".join(part for part in parts if part)


def _operators(rows: tuple[Operator, ...]) -> Any:
    from rich.table import Table

    table = Table("operator", "provider", "calls", "ms", "share", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        provider = row.provider.removesuffix("ExecutionProvider")
        table.add_row(row.type, provider, f"{row.calls:g}", f"{row.ms:.4f}", f"{row.share:.1%}")
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _bounds(interval: Interval | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"{low:.4g} – {'?' if math.isinf(high) else f'{high:.4g}'}"
