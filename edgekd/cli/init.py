"""`edgekd init`: a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path

import click

from edgekd.cli.common import finish, output_options, start

HEADER = """\
# A recipe for `edgekd compress --recipe {file}`. Every key is described in docs/recipe.md.

# The model to compress: a folder of transformers (config.json, model.safetensors, tokenizer or processor files)
# or the name of a hub model.
teacher: {teacher}

# text-classification or image-classification; found in the teacher's config.json when left out.
# task: text-classification

data:
  # A folder, a file (jsonl, csv, parquet, arrow), an image folder, IDX files, sklearn:digits or a hub data set.
  path: {data}
  # Which column is what, where the names do not say it: text, text_pair, image, label.
  # columns: {{text: review, label: sentiment}}
  # Which file or split is what, where the names do not say it: train, validation, test.
  # splits: {{train: train.jsonl, test: held_out.jsonl}}
  # More examples without labels; the teacher labels them.
  # unlabeled: more.jsonl
  # At most so many training examples, and tokens of each text.
  # limit: 10000
  # max_length: 128

# The devices to build for: names (see `edgekd targets list`) or paths of target files. One bundle is made for each.
targets: [local]

# What each bundle must satisfy. A limit counts as met only if the whole confidence interval of the measurement is
# within it, and as missed only if the whole interval is beyond it.
budget:
  # Times as fast as the fp32 teacher (ratio of medians of one interleaved run), or latency_p95_ms in milliseconds.
  speedup: 4
  # latency_p95_ms: 5
  # What is timed: examples at once, tokens of each (texts only), threads (the target's own when left out).
  batch: 1
  sequence: 64
  # threads: 1
  # The most the metric may fall below the teacher's (0.02 is two points), or min_accuracy, the least it may be.
  accuracy_drop: 0.02
  # Megabytes (10^6 bytes) of the ONNX file.
  # size_mb: 20
  # How often to go round again with a tighter internal budget when the measured artifact misses the limit.
  max_rounds: 3

seed: 0

"""


@click.command(short_help="Write a commented recipe to start from.")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="recipe.yaml")
@click.option(
    "--preset",
    type=click.Choice(["balanced", "fast", "accurate", "small"]),
    default="balanced",
    show_default=True,
    help="Where the stages and their settings come from.",
)
@click.option("--teacher", default="path/to/teacher", show_default=True, help="Model folder or hub name to put in.")
@click.option("--data", default="path/to/data", show_default=True, help="Data to put in.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@output_options
def command(
    path: Path, preset: str, teacher: str, data: str, force: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Write a commented recipe to PATH (default recipe.yaml), ready to be filled in.

    In: nothing. Out: a YAML file that `edgekd compress --recipe PATH` runs.

    \b
    Example:
      edgekd init movies.yaml --preset fast --teacher teachers/movies --data data/movies
    """
    from edgekd.errors import RecipeError
    from edgekd.files import write_text
    from edgekd.recipe import preset_text

    start(as_json=as_json, quiet=quiet, verbose=verbose)
    if path.exists() and not force:
        raise RecipeError(f"{path} exists; give another name, or --force to replace it")
    header = HEADER.format(file=path.name, teacher=_quoted(teacher), data=_quoted(data))
    write_text(path, header + preset_text(preset))
    finish({"recipe": str(path), "preset": preset}, as_json=as_json, text=lambda: click.echo(f"wrote {path}"))


def _quoted(text: str) -> str:
    from edgekd.yaml_lines import dump

    return dump([text]).strip().removeprefix("- ")
