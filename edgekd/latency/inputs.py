"""What an ONNX graph wants to be fed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import ModelError


@dataclass(frozen=True)
class Input:
    """One input of a graph: `shape` holds numbers, names of free dimensions, or None; `rows` the lookup table's."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    rows: int | None = None


def graph_inputs(path: Path) -> list[Input]:
    """The inputs of an ONNX graph that have to be fed.

    Raises:
        ModelError: there is no such file, or it is not ONNX.
    """
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}") from None
    except Exception as error:
        raise ModelError(f"{path} is not an ONNX model: {error}") from error
    if not graph.node:
        raise ModelError(f"{path} is not an ONNX model: it holds no graph")
    initial = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    scalars = {tensor.name for tensor in graph.initializer}
    rows = _lookup_rows(graph, initial)
    return [_input_of(value, rows) for value in graph.input if value.name not in scalars]


def _input_of(value: Any, rows: Mapping[str, int]) -> Input:
    import onnx

    kind = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type)
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None
        for dim in kind.shape.dim
    )
    return Input(value.name, dtype, shape, rows.get(value.name))


def _lookup_rows(graph: Any, initial: Mapping[str, int]) -> dict[str, int]:
    """Rows of the table each input looks up, where a Gather or a fused embedding node reads it directly."""
    origin: dict[str, str] = {}
    rows: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in ("Cast", "DequantizeLinear", "Identity") and node.input:
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
        pairs = []
        if node.op_type == "Gather":
            pairs = [(node.input[1], node.input[0])]
        elif node.op_type in ("EmbedLayerNormalization", "QEmbedLayerNormalization"):
            pairs = [(node.input[0], node.input[2])]
        for ids, table in pairs:
            source, held = origin.get(ids, ids), origin.get(table, table)
            if held in initial:
                rows[source] = min(rows.get(source, initial[held]), initial[held])
    return rows
