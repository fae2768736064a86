"""How good a cut model is before any training, by criterion, with and without reconstruction.

    python bench/pruning_criteria.py TEACHER DATA

For three shapes of a 6-layer teacher with 12 heads and 1536 neurons a layer: divergence from the teacher in nats, and
accuracy, both on validation. Writes bench/results/pruning_criteria.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.context import Silent
from edgekd.data import DataSpec
from edgekd.distill.teachers import predict
from edgekd.pipeline.setup import prepare
from edgekd.prune.plan import plan_from_settings
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.criteria import CRITERIA
from edgekd.surgery.reconstruct import output_errors, reconstruct
from edgekd.surgery.sample import sample_batches

RESULTS = Path(__file__).parent / "results" / "pruning_criteria.json"
SHAPES: tuple[tuple[list[int] | None, int, int], ...] = (
    (None, 6, 512),
    ([0, 2, 4, 5], 6, 512),
    ([0, 3, 5], 4, 256),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--every", type=int, default=2, help="score on every so-many-th validation example")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = prepare(options.teacher, DataSpec(path=str(options.data)), progress=Silent())
    validation = setup.validation.take(np.arange(0, len(setup.validation), options.every))
    batches = sample_batches(setup.train, options.samples, seed=0)
    student = setup.teacher
    truth = predict(student.model, validation)

    def score(model: Any) -> dict[str, float]:
        logits = predict(model, validation)
        log, wanted = torch.from_numpy(logits).log_softmax(-1), torch.from_numpy(truth).log_softmax(-1)
        divergence = (wanted.exp() * (wanted - log)).sum(-1).mean()
        accuracy = setup.task.score(logits, validation.labels)
        return {"divergence": round(float(divergence), 4), "accuracy": round(accuracy, 4)}

    rows = []
    for criterion in CRITERIA:
        importance = measure_importance(student, batches, criterion=criterion)
        for layers, heads, neurons in SHAPES:
            plan = plan_from_settings(student.arch, layers, heads, neurons)
            plain = cut(student, plan, importance)
            fitted = reconstruct(student, plain, batches)
            row = {
                "criterion": criterion,
                "shape": plan.describe(),
                "layers": [layer.source for layer in plan.layers],
                "cut": score(plain.model),
                "reconstructed": score(fitted.model),
                "layer_errors": {
                    "cut": [round(error, 4) for error in output_errors(student, plain, batches[:2])],
                    "reconstructed": [round(error, 4) for error in output_errors(student, fitted, batches[:2])],
                },
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    facts = {
        "command": f"python bench/pruning_criteria.py TEACHER DATA --samples {options.samples} --every {options.every}",
        "teacher": options.teacher.name,
        "data": options.data.name,
        "samples": options.samples,
        "validation": len(validation),
        "teacher_score": score(student.model),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
