"""Load what a run starts from: teacher, task, processor and encoded data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.context import Budget, Progress
from edgekd.data import DataSpec, Examples, load_splits
from edgekd.errors import DataError, RecipeError
from edgekd.export.parity import torch_logits
from edgekd.files import sha256_file, sha256_folder, sha256_json
from edgekd.student import PROCESSOR_FILES, Student, load_student, local_folder, read_config
from edgekd.target import Target
from edgekd.tasks import Encoded, Processor, Task, get_task, infer_task


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that does not depend on target or stage.

    `key` is a hash over the teacher's files and the data, the root of all stage keys. `metric` is the task's metric,
    or `agreement` (with the teacher) where the data has no labels to report on. `raw` are the splits before encoding,
    `max_length` the most tokens an example was encoded to (None: all the model takes).
    """

    teacher: Student
    task: Task
    processor: Processor
    train: Encoded
    validation: Encoded
    test: Encoded | None
    metric: str
    notes: tuple[str, ...]
    key: Mapping[str, str]
    raw: Mapping[str, Examples]
    max_length: int | None = None
    _encoded: dict[str, Setup] = field(default_factory=dict, init=False, repr=False, compare=False)

    def for_student(self, student: Student) -> Setup:
        """The same setup as this student reads it: with its own tokenizer, where that is not the teacher's.

        Labels stay, also those that the teacher gave. Each tokenizer encodes the texts once.

        Raises:
            ModelError: the tokenizer cannot be used.
        """
        if self.task.kind != "text" or student.processor_dir is None or same_tokenizer(self.teacher, student):
            return self
        name = tokenizer_hash(student.processor_dir)
        if name not in self._encoded:
            self._encoded[name] = self._read_by(self.task.load_processor(student.processor_dir))
        return self._encoded[name]

    def _read_by(self, processor: Processor) -> Setup:
        parts: dict[str, Any] = {}
        for name, examples in self.raw.items():
            if (own := getattr(self, name)) is not None:
                texts = self.task.encode(processor, examples, self.max_length)
                parts[name] = dataclasses.replace(texts, labels=own.labels)  # type: ignore[type-var]
        return dataclasses.replace(self, processor=processor, **parts)

    @property
    def reported(self) -> tuple[str, Encoded]:
        """The split that results are reported on: test, or validation where there is none."""
        return ("test", self.test) if self.test is not None else ("validation", self.validation)


def prepare(
    teacher: str | Path, spec: DataSpec, *, task: str | None = None, max_length: int | None = None, progress: Progress
) -> Setup:
    """Load and check teacher and data, and encode every split once.

    Raises:
        ModelError: the teacher cannot be used.
        DataError: the data cannot be used.
    """
    folder = local_folder(str(teacher))
    config = read_config(folder)
    chosen = get_task(task or infer_task(config))
    # As a teacher it is its weights: how it was to be lowered, or what it promised of zeros, is not handed on.
    model = replace(load_student(folder, auto_class=chosen.auto_class), quantization=None, sparsity=None, plan=None)
    splits = load_splits(spec, kind=chosen.kind, id2label=id2label(model.model.config))
    for note in splits.notes:
        progress.say(f"data: {note}")
    if not len(splits.train):
        raise DataError(f"{spec.path}: the training split is empty")
    processor = chosen.load_processor(folder)

    def encode(examples: Examples) -> Encoded:
        return chosen.encode(processor, examples, max_length)

    test = encode(splits.test) if splits.test is not None and len(splits.test) else None
    validation, agreed = with_teacher_labels(encode(splits.validation), model.model)
    test_agreed = False
    if test is not None:
        test, test_agreed = with_teacher_labels(test, model.model)
    reported = test_agreed if test is not None else agreed
    return Setup(
        teacher=model,
        task=chosen,
        processor=processor,
        train=encode(splits.train),
        validation=validation,
        test=test,
        metric="agreement" if reported else chosen.metric,
        notes=splits.notes,
        key={"teacher": sha256_folder(folder), "data": splits.fingerprint, "max_length": str(max_length)},
        raw={
            "train": splits.train, "validation": splits.validation,
            **({"test": splits.test} if splits.test is not None else {}),
        },
        max_length=max_length,
    )  # fmt: skip


def fitted(setup: Setup, target: Target, budget: Budget) -> Setup:
    """The same setup with every text cut to the sequence length that the target's fixed shapes leave room for.

    Labels stay those of the whole texts, and so does what the teacher is scored on.

    Raises:
        RecipeError: the sequence length is more than the model takes.
    """
    if setup.task.kind != "text" or not (target.is_static or budget.asks_latency):
        return setup
    length = check_length(setup.processor, budget)
    if not target.is_static:
        return setup
    parts: dict[str, Any] = {}
    for name, examples in setup.raw.items():
        whole = getattr(setup, name)
        if whole is not None and len(whole) and int(whole.lengths.max()) > length:
            cut = setup.task.encode(setup.processor, examples, length)
            parts[name] = dataclasses.replace(cut, labels=whole.labels)  # type: ignore[type-var]
    key = {**setup.key, "max_length": str(length)} if parts else setup.key
    return dataclasses.replace(setup, **parts, key=key, max_length=min(setup.max_length or length, length))


def same_tokenizer(one: Student, other: Student) -> bool:
    """Whether two students read texts in the same tokens; a student without tokenizer files is taken to."""
    if one.processor_dir is None or other.processor_dir is None or one.processor_dir == other.processor_dir:
        return True
    return tokenizer_hash(one.processor_dir) == tokenizer_hash(other.processor_dir)


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the tokenizer files of a model folder."""
    return sha256_json({name: sha256_file(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()})


def check_length(processor: Processor, budget: Budget) -> int:
    """The budget's sequence length: the shapes' own on some targets, on all that which latencies are of.

    Raises:
        RecipeError: it is more than the model takes.
    """
    most = processor.max_length
    if most is not None and budget.sequence > most:
        raise RecipeError(f"budget.sequence is {budget.sequence}; expected 1 to {most}, the most this model takes")
    return budget.sequence


def id2label(config: Any) -> dict[int, str]:
    """Class names by number, as transformers configs hold them."""
    return {int(index): str(name) for index, name in config.id2label.items()}


def with_teacher_labels(encoded: Encoded, teacher: Any) -> tuple[Encoded, bool]:
    """The same examples, labelled by the teacher if none has a label; whether that was so."""
    if encoded.labels is not None and bool((encoded.labels >= 0).any()):
        return encoded, False
    labels = torch_logits(teacher, encoded).argmax(axis=-1).astype(np.int64)
    return dataclasses.replace(encoded, labels=labels), True  # type: ignore[type-var]
