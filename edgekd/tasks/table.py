"""The tasks there are, and which of them a model is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from edgekd.errors import ModelError, RecipeError, unknown
from edgekd.tasks import image_classification, text_classification
from edgekd.tasks.task import Processor, Task

TASKS: dict[str, Task] = {task.name: task for task in (text_classification.TASK, image_classification.TASK)}


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        RecipeError: there is no such task.
    """
    if name not in TASKS:
        raise RecipeError(unknown("task", name, TASKS))
    return TASKS[name]


def infer_task(config: Mapping[str, Any]) -> str:
    """The task a model is for, from its `config.json`.

    Raises:
        ModelError: it is for none of the tasks, or its labels are of a kind that is not supported.
    """
    problem = config.get("problem_type")
    labels = config.get("id2label")
    if problem not in (None, "single_label_classification") or (labels is not None and len(labels) == 1):
        what = problem or "a single output, which means regression"
        raise ModelError(
            f"config.json says {what}, which is not supported; use a model that picks one of several classes"
        )
    architectures = list(config.get("architectures") or [])
    for task in TASKS.values():
        # A distilled DeiT has a second head, and its class another ending.
        if any(str(name).removesuffix("WithTeacher").endswith(task.architecture) for name in architectures):
            return task.name
    got = f"names {', '.join(architectures)}" if architectures else "names no architecture"
    endings = ", ".join(f"…{task.architecture}" for task in TASKS.values())
    raise ModelError(
        f"config.json {got}, so the task is unclear (supported: {endings}); "
        f"use a fine-tuned classifier, or state the task: one of {', '.join(TASKS)}"
    )


def example_feeds(
    task: Task, processor: Processor, config: Mapping[str, Any], batch: int, sequence: int | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Inputs of the ONNX graph for measuring and export: the same every time.

    Args:
        task: the task of the model.
        processor: what `task.load_processor` gave.
        config: the model's config; its `vocab_size`, where given, bounds the token ids.
        batch: number of examples.
        sequence: tokens of each (text only); None means the longest the model takes, at most 128.

    Returns:
        int64 `input_ids`, `attention_mask` (all ones) and maybe `token_type_ids` [batch, sequence], or float32
        `pixel_values` [batch, channels, height, width].

    Raises:
        RecipeError: `batch` or `sequence` is out of range.
    """
    if batch < 1:
        raise RecipeError(f"batch is {batch}; expected at least 1")
    bounded = processor
    if processor.vocabulary is not None and config.get("vocab_size"):
        size = min(processor.vocabulary, int(config["vocab_size"]))
        bounded = replace(processor, vocabulary=size)
    return task.feeds(bounded, batch, sequence)
