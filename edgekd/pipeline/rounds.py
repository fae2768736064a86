"""One round of a run: the student it ends with, judged, and how much tighter the next one has to be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.context import Budget, Progress
from edgekd.latency.verdict import PASS
from edgekd.pipeline.baseline import Baseline
from edgekd.pipeline.finish import Judged, final_artifact, judged
from edgekd.pipeline.setup import Setup
from edgekd.pipeline.stages import Travelled
from edgekd.target import Target

HEADROOM = 0.98
"""After a miss the budget is tightened by the measured error and this much more."""
ROUND = "round.json"
"""In the scratch of a round that missed: what came out, and how much tighter the next one is."""


@dataclass(frozen=True)
class Made:
    """What a round came to, and its scratch; `judgement` None: an earlier process, killed since, has judged it."""

    travelled: Travelled
    work: Path
    judgement: Judged | None


def judge(
    travelled: Travelled, setup: Setup, base: Baseline, target: Target, budget: Budget, work: Path, progress: Progress
) -> Judged:
    """Build the artifact of a student in `work`, measure and score it."""
    progress.say("export and measure the artifact")
    artifact = final_artifact(travelled.student, setup, target, budget, work)
    judgement = judged(artifact, travelled.student, setup, base, target, budget, work)
    progress.say(f"{target.name}: {judgement.verdict.status}: {judgement.verdict.reason}")
    return judgement


def read_round(file: Path) -> dict[str, Any] | None:
    """What an earlier process wrote of a round that missed; None if there is nothing that can be read."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return {"round": dict(told["round"]), "strictness": float(told["strictness"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def overshoot(judgement: Judged, budget: Budget) -> float | None:
    """Measured over asked latency; None where another round could not help: the latency is met, or none is asked."""
    measurement = judgement.measurement
    if judgement.gauged.verdict.status == PASS:
        return None
    if budget.speedup is not None and measurement.speedup:
        return budget.speedup / measurement.speedup
    if budget.latency_p95_ms is not None and measurement.p95_ms:
        return measurement.p95_ms / budget.latency_p95_ms
    return None
