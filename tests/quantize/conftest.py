"""A tiny classifier whose labels are its own answers, and a stage's surroundings."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.context import Budget, Context, Silent
from edgekd.export.parity import torch_logits
from edgekd.student import Student, load_student
from edgekd.target import load_target, probe
from edgekd.tasks import TASKS
from edgekd.tasks.text_classification import EncodedText

FORMS = ("int8_dynamic", "int8_static", "fp32_fused", "int8_weights", "int4_weights")
"""A few forms of each kind: the more there are, the longer the tests take."""


def texts(labels: np.ndarray | None = None, *, count: int = 64, seed: int = 0) -> EncodedText:
    lengths = np.random.default_rng(seed + 1).integers(6, 16, count)
    ids = np.random.default_rng(seed).integers(5, 40, int(lengths.sum())).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    return EncodedText(
        ids=ids,
        types=np.zeros(len(ids), np.int8),
        starts=starts,
        lengths=lengths,
        labels=labels,
        padding=(0, 0),
        left=False,
        longest=16,
    )


def labelled(student: Student, *, count: int = 64, seed: int = 0) -> EncodedText:
    plain = texts(count=count, seed=seed)
    return texts(torch_logits(student.model, plain).argmax(1).astype(np.int64), count=count, seed=seed)


@pytest.fixture
def bert(make_model) -> Student:
    """A model whose answers differ: the head is centred on what the pooler gives."""
    import torch

    student = load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")
    student = student.with_model(copy.deepcopy(student.model))
    logits = torch.from_numpy(torch_logits(student.model, texts()))
    student.model.classifier.bias.data.sub_(logits.median(dim=0).values)
    return student


@pytest.fixture
def make_context(bert: Student, tmp_path: Path):
    def make(student: Student = bert, **other: Any) -> Context:
        values: dict[str, Any] = {
            "teacher": student,
            "task": TASKS["text-classification"],
            "processor": None,
            "train": labelled(student, seed=5),
            "validation": labelled(student),
            "test": None,
            "target": replace(probe(load_target("local")), lowerings=FORMS),
            "budget": Budget(sequence=16),
            "work": tmp_path,
            "cache": tmp_path / "cache",
            "progress": Silent(),
        }
        return Context(**{**values, **other})

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for measuring: the given milliseconds by form, 1 for others; counts the runs."""
    import edgekd.quantize.ptq as ptq
    from edgekd.latency.stats import Samples

    class Clock:
        def __init__(self) -> None:
            self.ms: dict[str, float] = {}
            self.runs: list[list[str]] = []

        def measure(self, subjects, **_: Any):
            self.runs.append([subject.name for subject in subjects])
            return [_samples(Samples, subject.name, self.ms.get(subject.name, 1.0)) for subject in subjects]

    found = Clock()
    monkeypatch.setattr(ptq, "measure", found.measure)
    return found


def _samples(make: Any, name: str, ms: float) -> Any:
    class Fixed:
        pass

    fixed = Fixed()
    fixed.name, fixed.ms = name, np.full(4, ms)
    return fixed
