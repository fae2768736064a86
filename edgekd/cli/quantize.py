"""`edgekd quantize`: fewer bits, with or without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from edgekd.cli.stage import stage_command

SETTINGS = ("lowering", "epochs", "weight_bits", "rounding", "observer")
"""Options that are settings of the stage."""


def _with_settings(command: click.Command) -> click.Command:
    """Let the most used settings be given as options of their own; `--set` still takes all of them, and wins."""
    inner: Callable[..., Any] | None = command.callback
    if inner is None:
        raise TypeError("a command without a function")

    def run(*, overrides: tuple[str, ...], **options: Any) -> Any:
        given = {name: options.pop(name) for name in SETTINGS}
        first = tuple(f"{name}={value}" for name, value in given.items() if value is not None)
        return inner(overrides=(*first, *overrides), lowering=None, **options)

    more = (
        click.Option(["--lowering"], help="One form of the target, auto or int8 [default: auto]."),
        click.Option(["--epochs"], type=click.IntRange(min=0), help="Train under quantization [default: 0, do not]."),
        click.Option(["--weight-bits"], type=click.IntRange(2, 8), help="8, 4, or 2 with --epochs [default: 8]."),
        click.Option(
            ["--rounding"],
            type=click.Choice(["nearest", "adaptive"]),
            help="How weights are rounded without training [default: nearest].",
        ),
        click.Option(
            ["--observer"],
            type=click.Choice(["minmax", "moving_average", "percentile", "mse", "entropy"]),
            help="How static ranges are found [default: minmax].",
        ),
    )
    others = [param for param in command.params if param.name != "lowering"]
    place = next(index for index, param in enumerate(others) if param.name == "overrides")
    command.params = [*others[:place], *more, *others[place:]]
    command.callback = run
    return command


command = _with_settings(
    stage_command(
        "quantize",
        "Stage: fewer bits, with or without training.",
        """Find the form of IN in fewer bits that is fastest on the target and keeps the metric.

    In: a model folder. Out: the same with its quantization in config.json, for `edgekd export`. Layers that hurt too
    much stay float. What to choose when is in docs/quantize.md.

    \b
    Examples:
      edgekd quantize distilled --data data/movies --threads 1 --out quantized
      edgekd quantize distilled --data data/movies --lowering int4_weights --rounding adaptive --out small
      edgekd quantize distilled --teacher teachers/movies --data data/movies --epochs 2 --out trained
    """,
    )
)
