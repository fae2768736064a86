"""Full QDQ: every tensor of the graph in 8 or 16 bits with a scale that was calibrated, for NPUs and other runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import RecipeError
from edgekd.export.masks import barred, plain_masks
from edgekd.export.static import drop_unused, infer_shapes, simplify

Range = tuple[float, float]

OPSET = 21
"""Gelu is a standard operator since 20, and Q/DQ have 16-bit types since 21."""
SAME_VALUES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand")
MULTIPLIED = ("MatMul", "Gemm", "Conv")


def full_qdq(graph: Any, ranges: Mapping[str, Range], scratch: Path, *, activation_bits: int = 8) -> Any:
    """Quantize everything that an NPU computes: activations unsigned with 8 or 16 bits, weights with 8.

    Weights of Gemm and Conv have a signed scale per output channel, LayerNormalization's one unsigned scale: that is
    what Qualcomm's HTP takes. Token ids and the attention mask stay integer inputs, computed within the graph.

    Args:
        graph: float32 ModelProto; it is not changed.
        ranges: minimum and maximum of all its float tensors, from `calibrate(…, operators=None)`.
        scratch: an existing folder for passing files.
        activation_bits: 8 or 16.

    Raises:
        RecipeError: a tensor has no range, or one that holds a mask of unknown form.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.execution_providers.qnn.quant_config import get_qnn_qdq_config

    graph = simplify(graph, opset=OPSET)
    known = _spread(graph, ranges)
    if changed := plain_masks(graph, known):
        graph, known = simplify(drop_unused(graph)), {**known, **changed}
    known = _spread(graph, known)
    _require(graph, known)
    norms = {node.input[1] for node in graph.graph.node if node.op_type == "LayerNormalization"}
    config = get_qnn_qdq_config(
        graph,
        None,
        activation_type=QuantType.QUInt16 if activation_bits == 16 else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        init_overrides={name: [{"quant_type": QuantType.QUInt8, "symmetric": False}] for name in sorted(norms)},
    )
    # Otherwise operators between unquantized inputs, such as the mask's, would stay float islands.
    options = {**config.extra_options, "ForceQuantizeNoInputCheck": True}
    return _quantize(graph, known, scratch, config.op_types_to_quantize, config.activation_type, options)


def multiplied_qdq(graph: Any, ranges: Mapping[str, Range], scratch: Path) -> Any:
    """Quantize what goes into MatMul, Gemm and Conv, all signed with zero point 0, and leave the rest float.

    That is explicit quantization as TensorRT wants it: its fusions decide what else runs in 8 bits, and biases stay
    float. Weights have a scale per output channel.

    Raises:
        RecipeError: a tensor has no range.
    """
    from onnxruntime.quantization import QuantType

    graph = simplify(graph, disabled=("MatMulAddFusion",))
    known = _spread(graph, ranges)
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "DedicatedQDQPair": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(MULTIPLIED),
        "MinimumRealRange": 0.0001,
    }
    return _only_multiplied(_quantize(graph, known, scratch, MULTIPLIED, QuantType.QInt8, options))


def _only_multiplied(graph: Any) -> Any:
    """Give other operators that share a quantized tensor, such as residual additions, the float one back."""
    floats = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
    pairs = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.graph.node:
        if node.op_type not in (*MULTIPLIED, "DequantizeLinear"):
            for index, name in enumerate(node.input):
                node.input[index] = floats.get(pairs.get(name, ""), name)
    return drop_unused(graph)


def _quantize(
    graph: Any,
    ranges: Mapping[str, Range],
    scratch: Path,
    operators: Sequence[str],
    activation: Any,
    options: Mapping[str, Any],
) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    file = scratch / "simple.onnx"
    onnx.save(graph, file)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        load_model_with_shape_infer(file),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=activation,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted(operators),
        extra_options=dict(options),
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


def _spread(graph: Any, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges of tensors that hold the same values as one whose range is known, which the fusions gave new names."""
    known = dict(ranges)
    moves = [(node.input[0], node.output[0]) for node in graph.graph.node if node.op_type in SAME_VALUES]
    for before, after in moves:
        if before in known:
            known.setdefault(after, known[before])
    for before, after in reversed(moves):
        if after in known:
            known.setdefault(before, known[after])
    return known


def _require(graph: Any, ranges: Mapping[str, Range]) -> None:
    from onnx import TensorProto

    typed = infer_shapes(graph).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
    floats = [name for node in typed.node for name in node.output if kinds.get(name) == TensorProto.FLOAT]
    if missing := [name for name in floats if name not in ranges]:
        raise RecipeError(
            f"no calibrated range for {len(missing)} tensors ({', '.join(missing[:3])}): full QDQ needs those of all "
            "tensors; calibrate the same float graph with operators=None"
        )
    if masks := barred({name: ranges[name] for name in floats}):
        raise RecipeError(
            f"{masks[0]} holds an attention mask in a form that 8 bits cannot keep beside scores; "
            "export the model with attn_implementation='eager' or 'sdpa'"
        )
