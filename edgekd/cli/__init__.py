"""The command line: a lazy click group, so that `--help` imports nothing heavy."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import click

from edgekd import __version__
from edgekd.errors import EdgekdError

COMMANDS = {
    "compress": "Teacher, data, device and budget in; deployable ONNX bundle out.",
    "demo": "Run the whole pipeline on a small built-in example.",
    "finetune": "Make a teacher from a base model and labelled data.",
    "evaluate": "Metric of a bundle's ONNX artifact on data.",
    "parity": "Compare an artifact with its student, layer by layer.",
    "profile": "Latency of an ONNX model or bundle on a target.",
    "calibrate": "Measure a latency table of a target.",
    "predict": "Predict a latency from a table.",
    "export": "Turn a student folder into an ONNX bundle.",
    "report": "Write the report of a finished run again.",
    "targets": "List, show or check target files.",
    "init": "Write a commented recipe to start from.",
    "supernet": "Stage: train all sub-networks at once.",
    "search": "Stage: choose the shape that fits the budget.",
    "prune": "Stage: cut the model to the chosen shape.",
    "operators": "Stage: compute the layers in cheaper ways.",
    "distill": "Stage: recover accuracy from the teacher.",
    "vocabulary": "Stage: leave out words that the task never uses.",
    "quantize": "Stage: fewer bits, with or without training.",
    "sparsify": "Stage: zeros that the device can use.",
}

EXIT_CODES = """\b
Exit codes: 0 success, 1 bug, 2 usage or configuration, 3 budget missed,
4 accuracy floor (or parity) missed, 5 inconclusive verdict."""


class LazyGroup(click.Group):
    """Imports a command's module only when that command is run or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import `edgekd.cli.NAME` and return its `command`."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edgekd.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an `EdgekdError` becomes one message and its exit code, in JSON too if that is asked for."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _tell_json(ctx, "UsageError", error.format_message())
            raise
        except EdgekdError as error:
            _tell_json(ctx, type(error).__name__, str(error))
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the arguments, so that errors know whether JSON was asked for."""
        ctx.meta["edgekd.argv"] = tuple(args)
        return super().parse_args(ctx, args)


def _tell_json(ctx: click.Context, kind: str, message: str) -> None:
    if "--json" in ctx.meta.get("edgekd.argv", ()):
        click.echo(json.dumps({"error": {"kind": kind, "message": message}}, indent=2))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(__version__, "-V", "--version", prog_name="edgekd")
def main() -> None:
    """Make a Hugging Face model small and fast enough for the device it must run on.

    Search, prune, distill and quantize a student of your model, every stage taught by it, and get an ONNX bundle
    whose latency was measured.

    \b
    Start here:
      edgekd demo
      edgekd compress TEACHER --data DIR --target local --speedup 4 --out runs/mine
      edgekd COMMAND --help
    """


if __name__ == "__main__":
    sys.exit(main())
