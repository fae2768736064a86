"""What all commands share: output options, quiet libraries, progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from edgekd.context import Progress, Silent

Function = TypeVar("Function", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN and infinity: no bound keeps NaN out, and nothing is ever met or missed by it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a number; a usage error if it is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def output_options(function: Function) -> Function:
    """Add `--json`, `--quiet` and `-v`; the command receives them as `as_json`, `quiet` and `verbose`."""
    options = (
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
        click.option("--quiet", "-q", is_flag=True, help="No progress, only the result."),
        click.option("--verbose", "-v", is_flag=True, help="Show warnings and logs of the libraries."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def start(*, as_json: bool, quiet: bool, verbose: bool) -> Progress:
    """Set up logging and warnings for one command and return where it reports progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # OpenMP threads that wait by spinning make every step several times slower beside any other busy process.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    if quiet:
        return Silent()
    from edgekd.cli.progress import TerminalProgress

    return TerminalProgress()


def finish(result: Mapping[str, Any], *, as_json: bool, text: Callable[[], Any] | None = None) -> None:
    """Print the result: JSON on stdout, or what `text` renders."""
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    elif text is not None:
        text()


def data_options(function: Function) -> Function:
    """Add the options that say how to read the data; the command receives what `data_spec` takes."""
    options = (
        click.option("--data", metavar="DATA", help="Folder, file, image folder, IDX files, sklearn:digits, hub name."),
        click.option("--column", "columns", multiple=True, metavar="ROLE=NAME", help="text, text_pair, image, label."),
        click.option("--split", "splits", multiple=True, metavar="ROLE=NAME", help="train, validation, test."),
        click.option("--unlabeled", metavar="FILE", help="More training examples, without labels."),
        click.option("--limit", type=click.IntRange(min=1), help="At most so many training examples."),
        click.option("--max-length", type=click.IntRange(min=1), help="At most so many tokens of each text."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def data_section(settings: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `data_options` out of a command's settings, as the `data` section of a recipe.

    Raises:
        RecipeError: a pair has no `=`.
    """
    section: dict[str, Any] = {"path": settings.pop("data")}
    for key, option in (("columns", "--column"), ("splits", "--split")):
        section[key] = {role: str(name) for role, name in _pairs(settings.pop(key), option).items()}
    section.update({key: settings.pop(key) for key in ("unlabeled", "limit", "max_length")})
    return {key: value for key, value in section.items() if value not in (None, {})}


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read `--set KEY=VALUE` options of a stage; the values are YAML.

    Raises:
        RecipeError: a pair has no `=`, or its value is not YAML.
    """
    from edgekd.errors import RecipeError
    from edgekd.yaml_lines import parse

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {pair!r}: expected KEY=VALUE, for instance --set samples=128")
        try:
            settings[key.strip()] = parse(value).value
        except ValueError as error:
            raise RecipeError(f"--set {pair!r}: not valid YAML: {error}") from None
    return settings


def parse_section(option: str, text: str) -> dict[str, Any]:
    """Read the settings of a stage from one option, as they stand in a recipe.

    Raises:
        RecipeError: it is not a YAML mapping.
    """
    from edgekd.errors import RecipeError
    from edgekd.yaml_lines import parse

    try:
        value = parse(text).value
    except ValueError as error:
        raise RecipeError(f"{option} {text!r}: not valid YAML: {error}") from None
    if not isinstance(value, Mapping):
        raise RecipeError(f"{option} {text!r}: expected settings such as '{{}}' or '{{key: value}}'")
    return dict(value)


def budget_options(function: Function) -> Function:
    """Add the options of the budget; the command receives what `budget_section` takes."""
    above_zero = FiniteRange(min=0, min_open=True)
    options = (
        click.option("--latency-p95-ms", type=above_zero, help="Budget: 95th percentile in milliseconds."),
        click.option("--speedup", type=FiniteRange(min=1, min_open=True), help="Budget: times the fp32 teacher."),
        click.option(
            "--batch", type=click.IntRange(min=1), help="Examples per inference [default: the target's, or 1]."
        ),
        click.option(
            "--sequence", type=click.IntRange(min=1), help="Tokens per example [default: the target's, or 64]."
        ),
        click.option("--threads", type=click.IntRange(min=1), help="Threads [default: the target's]."),
    )
    for option in reversed(options):
        function = option(function)
    return function


BUDGET = ("latency_p95_ms", "speedup", "batch", "sequence", "threads", "size_mb", "accuracy_drop", "min_accuracy")


def budget_section(settings: dict[str, Any]) -> dict[str, Any]:
    """Take the budget out of a command's settings, as the section of a recipe."""
    values = {key: settings.pop(key, None) for key in BUDGET}
    return {key: value for key, value in values.items() if value is not None}


def _pairs(pairs: tuple[str, ...], option: str) -> dict[str, str]:
    from edgekd.errors import RecipeError

    read = {}
    for pair in pairs:
        role, equals, name = pair.partition("=")
        if not (equals and role and name):
            raise RecipeError(f"{option} {pair!r}: expected ROLE=NAME, for instance {option} label=sentiment")
        read[role.strip()] = name.strip()
    return read
