"""16-bit floats: weights and arithmetic, for GPUs, or weights alone, for small files."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LEAST_WEIGHTS = 256
"""Smaller tensors, such as scales and biases, stay in float32."""


def to_half(graph: Any) -> Any:
    """The graph in float16, by onnxruntime's converter, with float32 inputs and outputs.

    Numbers beyond float16 become its largest (65504), which bars a masked score just as well. The CPU provider
    computes most operators of such a graph in float32 between casts: it checks the weights, not the arithmetic.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    half = OnnxModel(convert_float_to_float16(graph, keep_io_types=True))
    half.topological_sort()  # the converter appends the cast of a float input behind the nodes that read it
    return half.model


def store_half(graph: Any, *, brain: bool = False) -> Any:
    """The graph with weights stored in 16 bits, and computed in what the runtime likes: half the file.

    A CPU runtime turns them back once, when it loads the graph, and computes in float32 at its speed. OpenVINO may
    compute in bfloat16, if the target's options say so.

    Args:
        graph: float32 ModelProto; it is not changed.
        brain: bfloat16 instead of float16.
    """
    from onnx import TensorProto, helper, numpy_helper

    stored = type(graph)()
    stored.CopyFrom(graph)
    casts = []
    for tensor in stored.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < LEAST_WEIGHTS:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        small, kind = (_brain(values), TensorProto.BFLOAT16) if brain else (_half(values), TensorProto.FLOAT16)
        tensor.Clear()
        tensor.CopyFrom(helper.make_tensor(f"{name}_half", kind, values.shape, small.tobytes(), raw=True))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *stored.graph.node]
    made = helper.make_graph(nodes, "stored", [], [])
    del stored.graph.node[:]
    stored.graph.node.extend(made.node)
    return stored


def _half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    largest = float(np.finfo(np.float16).max)
    return np.clip(values, -largest, largest).astype(np.float16)


def _brain(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of bfloat16: the upper half of a float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
