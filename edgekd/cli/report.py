"""`edgekd report`: the report of a finished run."""

from __future__ import annotations

from pathlib import Path

import click

from edgekd.cli.common import finish, output_options, start


@click.command(short_help="Write the report of a finished run again.")
@click.argument("run", type=click.Path(path_type=Path))
@output_options
def command(run: Path, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Show the result of RUN and write RUN/report.html again.

    In: the folder of a finished run. Out: table and HTML.

    \b
    Example:
      edgekd report runs/movies
    """
    start(as_json=as_json, quiet=quiet, verbose=verbose)
    from edgekd.pipeline.compress import report_again
    from edgekd.report.terminal import show

    result = report_again(run)
    answer = result.to_dict()

    def text() -> None:
        show(result.manifests, answer["verdict"])
        click.echo(f"report: {result.folder / 'report.html'}")

    finish(answer, as_json=as_json, text=text)
