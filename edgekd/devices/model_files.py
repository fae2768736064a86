"""The files that make up one model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from edgekd.errors import ModelError


def files_of(model: Path) -> list[tuple[str, Path]]:
    """A model's file and those its weights are kept in: name relative to the model's folder, and path.

    Raises:
        ModelError: one of them is missing or outside the model's folder.
    """
    names = {model.name, *(_external(model) if model.suffix == ".onnx" else ())}
    for name in sorted(names):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ModelError(f"{model} keeps weights outside its folder, in {name}: save it anew in one folder")
        if not (model.parent / name).is_file():
            raise ModelError(f"{model} keeps weights in {name}, which is missing")
    return [(name, model.parent / name) for name in sorted(names)]


def _external(model: Path) -> set[str]:
    import onnx

    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:
        raise ModelError(f"{model} is not an ONNX model: {error}") from error
    locations = set()
    for tensor in _tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            locations |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return locations


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
