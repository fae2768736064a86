"""One form of a student as a target takes it: its ranges, its file, its operators, what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError, ModelError
from edgekd.export.lower import CALIBRATED, NOT_FROM_ONNX, Ranges, lower, operators_to_calibrate
from edgekd.export.nbits import WEIGHT_ONLY
from edgekd.export.operators import check_operators
from edgekd.export.parity import Logits, onnx_logits
from edgekd.export.tflite import export_tflite, tflite_logits
from edgekd.quantize.observers import WEIGHING, find
from edgekd.student import Student

if TYPE_CHECKING:
    from edgekd.context import Budget, Context
    from edgekd.target import Target
    from edgekd.tasks import Encoded, Task

TERNARY = 2
"""`weight_bits` that any form holds exactly, symmetric and with one scale for a row."""
EXAMPLES = 128
"""Training examples that ranges are calibrated on, unless quantize says otherwise."""


def needs_examples(form: str) -> bool:
    """Whether a form is made with ranges of activations."""
    return form in (*CALIBRATED, *NOT_FROM_ONNX)


def sample(examples: Encoded, count: int, *, seed: int) -> Encoded:
    """The examples that ranges are calibrated on.

    Raises:
        DataError: there are none.
    """
    if not len(examples):
        raise DataError("static quantization needs training examples to calibrate on, and there are none")
    return examples.take(np.random.default_rng(seed + 2).permutation(len(examples))[:count])


def find_ranges(graph: Path, form: str, examples: Encoded, *, observer: str = "minmax") -> Ranges:
    """Ranges of the activations of a float graph over all examples, one at a time and unpadded.

    Observers that weigh what is cut off against steps of 8 bits have nothing to weigh with 16: extremes count there.

    Raises:
        DataError: an example has values that are not finite.
    """
    if form == "int16_qdq" and observer in WEIGHING:
        observer = "minmax"
    return find(graph, _taken(graph, feeds_of(examples)), observer, operators_to_calibrate(form))


def _taken(graph: Path, feeds: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[dict[str, npt.NDArray[Any]]]:
    """What the graph takes of the feeds: tokenizers give token types to models that have none."""
    import onnx

    names = {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    return [{name: values for name, values in feed.items() if name in names} for feed in feeds]


def feeds_of(examples: Encoded) -> list[dict[str, npt.NDArray[Any]]]:
    """The inputs of a graph, one example at a time and unpadded."""
    feeds = []
    for index in range(len(examples)):
        batch = examples.collate(np.array([index]), int(examples.lengths[index]))
        feeds.append({name: value.numpy() for name, value in batch.items() if name != "labels"})
    return feeds


def write_form(
    student: Student,
    graph: Path,
    form: str,
    output: Path,
    *,
    target: Target | None = None,
    budget: Budget | None = None,
    ranges: Ranges | None = None,
) -> Path:
    """Lower the float `graph` of a student to a form, with fixed shapes where the target needs them.

    What training under quantization has learned (`activations`), the layers that stay float and the grid of weights
    are the student's own.

    Raises:
        ModelError: the result has operators that the target does not run.
    """
    fixed: dict[str, Any] = {}
    if target is not None and budget is not None and target.is_static:
        fixed = {"batch": budget.batch, "sequence": budget.sequence}
    file = lower(
        graph,
        output,
        form,
        ranges=ranges,
        model_type=student.model.config.model_type,
        symmetric=target is not None and target.symmetric,
        **_remembered(student, form),
        **fixed,
    )
    if target is not None and (problems := check_operators(file, target)):
        raise ModelError(f"the {form} graph does not suit {target.name}: {'; '.join(problems)}")
    return file


def _remembered(student: Student, form: str) -> dict[str, Any]:
    """What a student's quantization says of a form; layers stay float only in the form that it was chosen for."""
    own: dict[str, Any] = student.quantization or {}
    told: dict[str, Any] = {}
    for kind in ("activations", "attention"):
        if own.get(kind):
            told[kind] = {name: (low, high) for name, (low, high) in own[kind].items()}
    if own.get("lowering", form) == form and own.get("keep_float"):
        told["keep_float"] = tuple(own["keep_float"])
    if "table_bits" in own:
        told["table_bits"] = own["table_bits"]
    if form in WEIGHT_ONLY:
        told["weights"] = weights_of_form(student, form)
    return told


def weights_of_form(student: Student, form: str) -> dict[str, Any]:
    """What a student remembers of the grid of a weight-only form: what a quantizer or training has put weights on."""
    own = student.quantization or {}
    return dict(own.get("weights") or trained_grid(own.get("scheme") or {}, form))


def trained_grid(scheme: dict[str, Any], form: str) -> dict[str, Any]:
    """The grid on which training has put the weights, if a form of these bits holds it."""
    bits = scheme.get("weight_bits")
    if bits not in (WEIGHT_ONLY[form], TERNARY):
        return {}
    return {"group": 0 if bits == TERNARY else scheme.get("group", 0), "symmetric": True}


def write_tflite(
    student: Student,
    task: Task,
    output: Path,
    examples: Encoded,
    budget: Budget,
    told: dict[str, Any] | None = None,
) -> Path:
    """Convert a student to int8 TFLite, its ranges calibrated on the examples, with the budget's shapes.

    Norms have activations of 16 bits if the student's quantization says so (`wide`); if it says nothing, where they
    need them. `told` takes what that came to.

    Raises:
        RecipeError: the converter is not installed.
        StageError: it does not take the model.
    """
    sequence = budget.sequence if task.kind == "text" else None
    wide = (student.quantization or {}).get("wide")
    return export_tflite(
        student, task.name, feeds_of(examples), output, batch=budget.batch, sequence=sequence, wide=wide, told=told
    )


def metric_of(logits: Logits, ctx: Context) -> float:
    """The task's metric on validation.

    Raises:
        DataError: there are no labels.
    """
    labels = ctx.validation.labels
    if labels is None:
        raise DataError("the validation split has no labels and was not labelled by the teacher")
    return ctx.task.score(logits, labels)


def form_logits(file: Path, encoded: Encoded) -> Logits:
    """Logits `[N, C]` of an artifact on this machine's CPU, padded only where its shapes are fixed."""
    if file.suffix == ".tflite":
        return tflite_logits(file, feeds_of(encoded))
    return onnx_logits(file, encoded)
