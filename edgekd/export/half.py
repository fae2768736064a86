"""float16 weights and arithmetic, for GPUs; inputs and outputs stay as they were."""

from __future__ import annotations

from typing import Any


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
