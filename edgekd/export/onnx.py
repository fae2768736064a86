"""Float ONNX from a torch student, through optimum's exporter."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekd.errors import StageError
from edgekd.export.names import name_after_modules
from edgekd.student import Student, quiet_transformers
from edgekd.tasks import get_task

OPSET = 18
"""LayerNormalization is one operator since 17; 18 is the lowest that torch's exporter recommends."""


def export_float(student: Student, task: str, output: Path) -> Path:
    """Write the student as float32 ONNX with dynamic batch (and sequence), and check the file.

    Args:
        student: any shapes, in memory; it is exported in `eval()` mode.
        task: a task name that optimum knows, for instance `text-classification`.
        output: the file to write, `….onnx`.

    Raises:
        StageError: the exporter or the ONNX checker refuses the model.
    """
    import onnx
    from optimum.exporters.onnx import onnx_export_from_model

    model = student.model.eval()
    config = vars(model.config).pop("edgekd", None)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch, quiet_export():
            onnx_export_from_model(
                model, output=Path(scratch), task=task, opset=OPSET, do_validation=False,
                **_one_token_type(model, task),
            )  # fmt: skip
            graph = onnx.load(Path(scratch) / "model.onnx")
    except Exception as error:
        raise StageError(f"the ONNX export of {student.arch.describe()} failed: {error}") from error
    finally:
        if config is not None:
            model.config.edgekd = config
    name_after_modules(graph)
    _fix_image_size(graph, student, task)
    save_checked(graph, output)
    return output


def _one_token_type(model: Any, task: str) -> dict[str, Any]:
    """Options that leave token types out for a model with a single one, which needs no telling.

    optimum would ask for them, and trace with made-up ones of two types.
    """
    from optimum.exporters.tasks import TasksManager

    if getattr(model.config, "type_vocab_size", None) != 1:
        return {}
    usual = TasksManager.get_exporter_config_constructor(exporter="onnx", model=model, task=task)
    if "token_type_ids" not in usual(model.config).inputs:
        return {}

    class OneType(usual.func):  # type: ignore[misc, name-defined]
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: axes for name, axes in super().inputs.items() if name != "token_type_ids"}

    return {"custom_onnx_configs": {"model": OneType(model.config, **usual.keywords)}}


def _fix_image_size(graph: Any, student: Student, task: str) -> None:
    """State channels, height and width, which the processor fixes anyway: runtimes plan better with known shapes."""
    if student.processor_dir is None or get_task(task).kind != "image":
        return
    shape = get_task(task).load_processor(student.processor_dir).shape
    for value in graph.graph.input:
        if value.name == "pixel_values" and shape is not None:
            for dimension, size in zip(value.type.tensor_type.shape.dim[1:], shape, strict=True):
                dimension.Clear()
                dimension.dim_value = size


def save_checked(graph: object, output: Path) -> None:
    """Write an ONNX model after the ONNX checker has passed it.

    Raises:
        StageError: the checker refuses the graph.
    """
    import onnx

    if not isinstance(graph, onnx.ModelProto):
        raise TypeError(f"expected a ModelProto, got {type(graph).__name__}")
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise StageError(f"{output.name} is not a valid ONNX model: {error}") from error
    onnx.save(graph, output)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep the exporters' tracing warnings and log lines away from the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
