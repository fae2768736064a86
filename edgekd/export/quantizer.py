"""onnxruntime's QDQ quantizer with ranges that are already known."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Range = tuple[float, float]


def insert_pairs(
    graph: Any,
    ranges: Mapping[str, Range],
    scratch: Path,
    operators: Collection[str],
    *,
    activation: Any = None,
    options: Mapping[str, Any] | None = None,
    left: Collection[str] = (),
) -> Any:
    """Put Q/DQ pairs around some operators, weights in signed 8 bits per channel.

    Args:
        graph: float32 ModelProto; it stays as it is.
        ranges: smallest and largest value of each activation.
        scratch: an existing folder for passing files.
        operators: types of operators to quantize.
        activation: QuantType of activations [default: unsigned 8 bits].
        options: `extra_options` of the quantizer.
        left: names of nodes that stay float.

    Returns:
        The quantized ModelProto, its nodes sorted.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    file = scratch / "float.onnx"
    onnx.save(graph, file)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        load_model_with_shape_infer(file),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if activation is None else activation,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=list(left),
        op_types_to_quantize=sorted(operators),
        extra_options=dict(options or {}),
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model
