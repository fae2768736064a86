"""The teacher as what it would be without edgekd: a float32 ONNX graph, its metric and its size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.context import Progress
from edgekd.files import sha256_json
from edgekd.pipeline.artifact import build, score
from edgekd.pipeline.setup import Setup
from edgekd.store import RunFolder


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The teacher's graph and its metric on the reported split and on validation."""

    graph: Path
    size_bytes: int
    validation: float
    reported: float
    n: int


def quality(setup: Setup, file: Path) -> dict[str, Any]:
    """Metric of an ONNX file on the reported split."""
    split, encoded = setup.reported
    return {**score(file, setup.task, encoded), "metric": setup.metric, "split": split}


def baseline(run: RunFolder, setup: Setup, progress: Progress) -> Baseline:
    """Export and evaluate the teacher, or take what an earlier run of this folder did."""
    stage = run.stage(0, "teacher", sha256_json(["teacher", *sorted(setup.key.items())]))
    if not stage.complete:
        progress.say("teacher: export to ONNX and evaluate")
        work = run.begin(stage)
        artifact = build(setup.teacher, setup.task, setup.validation, work / "onnx")
        validation = score(artifact.file, setup.task, setup.validation)["value"]
        entry = {"validation": validation, **quality(setup, artifact.file)}
        draft = run.draft(stage)
        artifact.file.rename(draft / "model.onnx")
        stage = run.commit(stage, draft, entry)
    graph, facts = stage.path / "model.onnx", dict(stage.entry or {})
    progress.say(f"teacher: {facts['metric']} {facts['value']:.4f} on {facts['split']} ({facts['n']} examples)")
    return Baseline(
        graph=graph,
        size_bytes=graph.stat().st_size,
        validation=facts["validation"],
        reported=facts["value"],
        n=facts["n"],
    )
