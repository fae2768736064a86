"""A run killed with SIGKILL anywhere and started again ends with the artifact of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from edgekd.store import RunFolder

KILLED_AT = ("00-teacher", "01-prune", "training", "02-distill", "03-quantize")


def command(recipe: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "edgekd", "compress", "--recipe", str(recipe), "--out", str(run), "--quiet", "--json"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def reached(run: Path, place: str) -> bool:
    if place == "training":
        return any(run.glob(".work/02-distill-*/*.safetensors")) or any(run.glob(".work/02-distill-*/*/*.safetensors"))
    return (run / place / "stage.json").is_file()


def killed_at(recipe: Path, run: Path, place: str) -> bool:
    """Start the run and kill it when it gets to `place`; whether it was killed before it ended."""
    process = subprocess.Popen(
        command(recipe, run), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        if reached(run, place):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    return process.wait() == -signal.SIGKILL


def artifact(run: Path) -> str:
    return json.loads((run / "bundle" / "edgekd.json").read_text())["artifact"]["sha256"]


def decisions(run: Path) -> list[tuple[str, bool, str]]:
    """What the guard decided at each stage that is finished, in its own words: figures and all."""
    entries = [json.loads(file.read_text())["entry"] for file in sorted(run.glob("0[1-3]-*/stage.json"))]
    return [(entry["stage"], entry["kept"], entry["why"]) for entry in entries]


def test_a_killed_run_ends_with_the_same_artifact(make_recipe, tmp_path):
    stages = make_recipe().to_dict()["stages"]
    stages[1]["distill"].update(epochs=4, checkpoint_steps=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(stages=stages).to_yaml())
    subprocess.run(command(recipe, tmp_path / "whole"), env=environment(), capture_output=True, check=False)
    run = tmp_path / "killed"
    kills = [killed_at(recipe, run, place) for place in KILLED_AT]
    assert sum(kills) >= 3, f"the run was killed only at {kills} of {KILLED_AT}"
    assert not (run / "manifest.json").exists()
    decided = decisions(run)
    assert decided
    ended = subprocess.run(command(recipe, run), env=environment(), capture_output=True, check=False)
    assert ended.returncode in (0, 3, 5), ended.stderr
    assert artifact(run) == artifact(tmp_path / "whole")
    assert decisions(run)[: len(decided)] == decided, "decisions are taken up, not made again"
    assert [each[:2] for each in decisions(run)] == [each[:2] for each in decisions(tmp_path / "whole")]


def test_two_processes_cannot_share_a_run(make_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe().to_yaml())
    with RunFolder(tmp_path / "run").lock():
        done = subprocess.run(command(recipe, tmp_path / "run"), env=environment(), capture_output=True, check=False)
    assert done.returncode == 2
    assert f"is in use by process {os.getpid()}" in done.stderr.decode()
