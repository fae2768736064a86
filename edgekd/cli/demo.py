"""`edgekd demo`: the whole pipeline on the digits of scikit-learn."""

from __future__ import annotations

from pathlib import Path

import click

from edgekd.cli.common import finish, output_options, start

EPOCHS = 18
TEACHER = "scratch:vit"
DATA = "sklearn:digits"
RECIPE = {
    "teacher": "",
    "data": {"path": DATA},
    "targets": ["local"],
    "budget": {"speedup": 2.5, "batch": 1, "threads": 1, "accuracy_drop": 0.03},
    "stages": [
        {"search": {"samples": 128, "checks": 2}},
        {"prune": {}},
        {"distill": {"epochs": 15, "batch_size": 64, "learning_rate": 5e-4}},
        {"quantize": {}},
    ],
}


@click.command(short_help="Run the whole pipeline on a small built-in example.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/demo", show_default=True, help="Folder.")
@output_options
def command(out: Path, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Train a small vision transformer on scikit-learn's digits, then compress it for this machine.

    In: nothing; no network is used. Out: OUT/teacher and OUT/run with the bundle and the report, in minutes.

    \b
    Example:
      edgekd demo --out runs/demo
    """
    progress = start(as_json=as_json, quiet=quiet, verbose=verbose)
    from edgekd.data import DataSpec
    from edgekd.distill.finetune import Finetune, finetune
    from edgekd.pipeline.compress import compress
    from edgekd.recipe import load_recipe
    from edgekd.report.terminal import show

    teacher = out / "teacher"
    if not (teacher / "finetune.json").is_file():
        progress.say("demo: train a teacher, a vision transformer of 6 layers")
        settings = Finetune(epochs=EPOCHS, batch_size=64)
        finetune(TEACHER, DataSpec(path=DATA), teacher, settings=settings, seed=0, progress=progress)
    recipe = load_recipe("balanced", values={**RECIPE, "teacher": str(teacher)})
    result = compress(recipe, out / "run", progress=progress)
    progress.stop()
    answer = result.to_dict()

    def text() -> None:
        show(result.manifests, answer["verdict"])
        bundle = result.bundles["local"] if result.bundles else out
        click.echo(f"bundle: {bundle}\nreport: {result.folder / 'report.html'}\n\nNext:")
        click.echo(f"  edgekd profile {bundle} --target local --threads 1")
        click.echo("  edgekd compress YOUR_MODEL --data YOUR_DATA --target local --speedup 4 --out runs/yours")

    finish(answer, as_json=as_json, text=text)
    raise SystemExit(result.exit_code)
