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
    context = click.Context(main)
    command = main.get_command(context, name)
    if command is None:
        raise LookupError(name)
    lines = _section(command, name, "##")
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            if (part := command.get_command(context, each)) is not None:
                lines += _section(part, f"{name} {each}", "###")
    return lines


def _section(command: click.Command, name: str, level: str) -> list[str]:
    pieces = [piece for piece in command.collect_usage_pieces(click.Context(command)) if piece != "[OPTIONS]"]
    lines = [f"{level} `edgekd {' '.join([name, *pieces])}`", "", _plain(command.help or ""), ""]
    options = [param for param in command.params if isinstance(param, click.Option)]
    if not options:
        return lines
    lines += ["| option | meaning |", "|---|---|"]
    for param in options:
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
