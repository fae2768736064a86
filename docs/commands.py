"""Writes docs/commands.md from the commands themselves: `python docs/commands.py > docs/commands.md`."""

from __future__ import annotations

import inspect

import click

from edgekd.cli import COMMANDS, EXIT_CODES, main


def page() -> str:
    """The whole page as Markdown."""
    parts = ["# Commands", "", "Written by `python docs/commands.py`.", "", _plain(EXIT_CODES), ""]
    for name in COMMANDS:
        parts += _command(name)
    return "\n".join(parts)


def _command(name: str) -> list[str]:
    command = main.get_command(click.Context(main), name)
    if command is None:
        raise LookupError(name)
    arguments = [param.human_readable_name for param in command.params if isinstance(param, click.Argument)]
    lines = [f"## `edgekd {' '.join([name, *arguments])}`", "", _plain(command.help or ""), ""]
    lines += ["| option | meaning |", "|---|---|"]
    for param in command.params:
        if isinstance(param, click.Option):
            names = ", ".join(f"`{spelling}`" for spelling in [*param.opts, *param.secondary_opts])
            default = param.default
            shown = f" [default: {default}]" if param.show_default and default not in (None, False, ()) else ""
            lines.append(f"| {names} | {(param.help or '').replace('|', chr(92) + '|')}{shown} |")
    return [*lines, ""]


def _plain(text: str) -> str:
    """Click's help text as Markdown: what it must not wrap becomes a code block."""
    blocks = inspect.cleandoc(text).split("\n\n")
    marked = [block.replace("\b\n", "```text\n") + "\n```" if block.startswith("\b") else block for block in blocks]
    return "\n\n".join(marked)


if __name__ == "__main__":
    print(page(), end="")
