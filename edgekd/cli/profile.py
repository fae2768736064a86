"""`edgekd profile`: the latency of any ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.cli.common import FiniteRange, finish, output_options, start

if TYPE_CHECKING:
    from edgekd.latency.result import ProfileResult
    from edgekd.latency.stats import Samples

FELL_BACK = 3
GROUPS = {
    "Where": ("target", "threads", "cpus", "session"),
    "Inputs": ("batch", "sequence", "shapes", "values", "feeds"),
    "Budget": ("latency_p95_ms", "speedup", "baseline", "no_fallback"),
    "More to measure": ("pair", "batches", "sequences", "per_operator"),
    "Results": ("samples", "report", "plots", "out", "as_json", "quiet", "verbose"),
}
Parsed = Callable[[click.Context, click.Parameter, Any], Any]


class Grouped(click.Command):
    """A command whose help shows the options under the headings of `GROUPS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group, and one for what is in none."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {param.name: param.get_help_record(ctx) for param in options}
        grouped = {name for names in GROUPS.values() for name in names}
        for title, names in {**GROUPS, "Other": tuple(name for name in records if name not in grouped)}.items():
            rows = [record for name in names if (record := records.get(name)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=26)


def _pairs(example: str, read: Callable[[str], Any]) -> Parsed:
    """Read repeated KEY=VALUE options into a dictionary."""

    def parse(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
        found = {}
        for pair in pairs:
            # A name may hold `=`, a value may not.
            name, _, value = pair.rpartition("=")
            try:
                found[name] = read(value) if name else None
            except ValueError:
                found[name] = None
            if found[name] is None:
                raise click.BadParameter(f"{pair!r}: expected {example}")
        return found

    return parse


def _numbers(text: str, least: int = 1) -> tuple[int, ...] | None:
    parts = [part.strip() for part in text.split(",")]
    return tuple(map(int, parts)) if all(part.isdecimal() and int(part) >= least for part in parts) else None


def _list(example: str, least: int = 1) -> Parsed:
    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...]:
        numbers = () if text is None else _numbers(text, least)
        if numbers is None:
            raise click.BadParameter(f"{text!r}: expected whole numbers like {example}")
        return numbers

    return parse


def _cpus(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Read CPU numbers, each of them once: a thread is counted for each."""
    numbers: tuple[int, ...] = _list("0,1", 0)(ctx, param, text)
    if len(set(numbers)) < len(numbers):
        raise click.BadParameter(f"{text!r}: name every CPU once")
    return numbers


def _session(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read session options: `graph_optimization`, `disabled_optimizers`, and configuration entries (with a dot)."""
    from edgekd.errors import unknown
    from edgekd.target_fields import SESSION_OPTIONS

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            if not equals:
                raise ValueError("expected KEY=VALUE, for instance session.intra_op.allow_spinning=0")
            if "." in key:
                found.setdefault("config", {})[key] = value
            elif key == "disabled_optimizers":
                found[key] = value.split(",")
            elif key == "graph_optimization":
                found[key] = SESSION_OPTIONS[key](value)
            else:
                known = ("graph_optimization", "disabled_optimizers")
                raise ValueError(f"{unknown('session option', key, known)}, or an entry like session.…")
        except ValueError as error:
            raise click.BadParameter(f"{pair!r}: {error}") from None
    return found


FILE, FOLDER = click.Path(dir_okay=False, path_type=Path), click.Path(file_okay=False, path_type=Path)
ABOVE_ZERO, COUNT = FiniteRange(min=0, min_open=True), click.IntRange(min=1)


@click.command(cls=Grouped)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--target", default="local", show_default=True, help="Target to measure on: a name or a YAML file.")
@click.option("--threads", type=COUNT, metavar="N", help="Threads [default: the target's; local: all cores].")
@click.option("--cpus", metavar="0,1", callback=_cpus, help="CPUs to stay on [default: the quietest].")
@click.option("--session", multiple=True, metavar="KEY=VALUE", callback=_session,
              help="Option of the runtime: graph_optimization=basic, session.…=…; repeat for several.")  # fmt: skip
@click.option("--batch", type=COUNT, metavar="N", help="Examples per inference [default: 1].")
@click.option("--sequence", type=COUNT, metavar="N", help="Tokens per example [default: 64].")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224",
              callback=_pairs("NAME=1,3,224,224", _numbers),
              help="Shape of one input; repeat for several.")  # fmt: skip
@click.option("--value", "values", multiple=True, metavar="NAME=16000", callback=_pairs("NAME=16000", float),
              help="Fill one input with a number; repeat for several.")  # fmt: skip
@click.option("--feeds", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Inputs: an .npz by name.")
@click.option("--latency-p95-ms", type=ABOVE_ZERO, metavar="MS", help="Budget for p95 in milliseconds.")
@click.option("--speedup", type=ABOVE_ZERO, metavar="TIMES", help="Budget: times faster than --baseline.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="A second model, measured in turns with the first.",
)
@click.option("--no-fallback", is_flag=True, help="Exit code 3 if any node runs elsewhere than the target wants.")
@click.option("--compare", "pair", nargs=2, type=click.Path(path_type=Path), metavar="A B",
              help="Instead of MODEL: which of two models is faster.")  # fmt: skip
@click.option("--batches", metavar="1,2,4,8", callback=_list("1,2,4,8"), help="Also these batches, in turns.")
@click.option("--sequences", metavar="16,64", callback=_list("16,32,64"), help="Also these sequence lengths, in turns.")
@click.option("--per-operator", is_flag=True, help="Also the time of each operator type, and where it runs.")
@click.option("--samples", type=FILE, metavar="FILE", help="Write the raw samples to a CSV file.")
@click.option("--report", type=FILE, metavar="FILE", help="Write an HTML page with plots; it needs no network.")
@click.option("--plots", type=FOLDER, metavar="FOLDER", help="Write the plots as PNG files (needs matplotlib).")
@click.option("--out", type=FOLDER, metavar="FOLDER", help="Keep what a vendor's compiler makes of the model.")
@output_options
def command(
    model: Path | None,
    pair: tuple[Path, Path] | None,
    no_fallback: bool,
    per_operator: bool,
    samples: Path | None,
    report: Path | None,
    plots: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Measure the latency of MODEL on a target and compare it with a budget.

    \b
    In:   an .onnx file, a bundle, or a folder with model.onnx; no recipe needed
    Out:  percentiles with 95 % intervals, load time, memory; the verdict if a budget is given

    Exit code 0: budget met or none given; 3: missed, a node fell back under --no-fallback, or the target is not there;
    5: too close to tell.

    \b
    Examples:
      edgekd profile runs/movies/bundle --threads 1 --latency-p95-ms 4
      edgekd profile model.onnx --batches 1,2,4,8 --per-operator --report model.html
      edgekd profile --compare before.onnx after.onnx
    """
    asked = _check(model, pair, settings)
    progress = start(as_json=as_json, quiet=quiet, verbose=verbose)
    _check_outputs(samples, report, plots, asked["out"])
    from edgekd.latency.profiling import profile

    result = profile(**asked, per_operator=per_operator or no_fallback, say=progress.say)
    progress.stop()
    document = result.to_dict()
    _write(result, document, samples, report, plots)
    finish(document, as_json=as_json, text=lambda: _show(document))
    raise SystemExit(_exit_code(result, no_fallback=no_fallback))


def _check(model: Path | None, pair: tuple[Path, Path] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `profile`, after what does not go together is refused."""
    if (model is None) == (pair is None):
        raise click.UsageError("give either MODEL or --compare A B")
    if pair is not None and settings["baseline"] is not None:
        raise click.UsageError("--compare A B has its baseline already: A")
    made = [name for name in ("batches", "sequences", "shapes", "values", "batch", "sequence") if settings[name]]
    if settings["feeds"] is not None and made:
        option = {"shapes": "shape", "values": "value"}.get(made[0], made[0])
        raise click.UsageError(f"--{option} says what inputs to make up, --feeds brings them: give one of the two")
    asked = {**settings, "model": model}
    if pair is not None:
        asked |= {"baseline": pair[0], "model": pair[1], "tell_apart": True}
    if asked["speedup"] is not None and asked["baseline"] is None:
        raise click.UsageError("--speedup needs --baseline: the model to be faster than")
    return asked


def _check_outputs(samples: Path | None, report: Path | None, plots: Path | None, out: Path | None) -> None:
    """Refuse before measuring what could not be written after it.

    Raises:
        StoreError: a folder is not there or cannot be made, or matplotlib is missing.
    """
    from edgekd.errors import StoreError
    from edgekd.files import require_parent

    for file in (samples, report):
        if file is not None and not file.parent.is_dir():
            raise StoreError(f"cannot write {file}: there is no folder {file.parent}")
    for path in (samples, report, plots, out):
        if path is not None:
            require_parent(path)
    if plots is not None:
        from edgekd.report.png import require_matplotlib

        require_matplotlib()


def _write(
    result: ProfileResult, document: Mapping[str, Any], samples: Path | None, report: Path | None, plots: Path | None
) -> None:
    from edgekd.report.charts import Raw, charts

    if samples is not None and result.all_samples():
        write_samples(samples, result.all_samples())
    elif samples is not None:
        click.echo(f"nothing was measured: {samples} is not written", err=True)
    names = {"model": "B", "baseline": "A"} if result.comparison else {}
    raw = [Raw(names.get(part.name, part.name), part.ms, part.block) for part in result.samples]
    if report is not None:
        from edgekd.report.profile import write_profile

        write_profile(report, document, raw)
    if plots is not None:
        from edgekd.report.png import write_plots

        write_plots(plots, charts(document, raw))


def write_samples(path: Path, samples: tuple[Samples, ...]) -> None:
    """Write raw samples as CSV: model, block, milliseconds; the sizes of sweeps are models named `batch 4`.

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


def _show(document: Mapping[str, Any]) -> None:
    from edgekd.report.profile_terminal import show_profile

    show_profile(document)


def _exit_code(result: ProfileResult, *, no_fallback: bool) -> int:
    """0, or what the verdict, the placement and the target ask for; the reason for a fallback goes to stderr."""
    from edgekd.latency.verdict import EXIT_CODES, FAIL, PASS

    if result.measurement.kind == "unavailable":
        return EXIT_CODES[FAIL]
    if no_fallback and (problem := result.fallback_problem()):
        click.echo(f"Error: --no-fallback: {problem}", err=True)
        return FELL_BACK
    return EXIT_CODES[result.verdict.status if result.verdict else PASS]
