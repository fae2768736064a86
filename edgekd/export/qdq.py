"""Full QDQ: every tensor of the graph in 8 or 16 bits with a scale that was calibrated, for NPUs and other runtimes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import RecipeError
from edgekd.export.factors import fold_factors
from edgekd.export.masks import barred, plain_masks
from edgekd.export.names import kept_nodes
from edgekd.export.quantizer import Range, insert_pairs
from edgekd.export.static import drop_unused, infer_shapes, infer_types, simplify
from edgekd.export.widths import overrides, wide_tensors

OPSET = 21
"""Gelu is a standard operator since 20, and Q/DQ have 16-bit types since 21."""
SAME_VALUES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand")
MULTIPLIED = ("MatMul", "Gemm", "Conv")


def full_qdq(
    graph: Any,
    ranges: Mapping[str, Range],
    scratch: Path,
    *,
    activation_bits: int = 8,
    trained: Mapping[str, Range] | None = None,
    wide: Collection[str] = (),
) -> Any:
    """Quantize everything that an NPU computes: activations unsigned with 8 or 16 bits, weights with 8.

    Weights of MatMul, Gemm and Conv have a signed scale per output channel, LayerNormalization's one unsigned scale:
    that is what Qualcomm's HTP takes. Token ids and the attention mask stay integer inputs, computed within the graph.
    Factors of attention scores go into the weights before them.

    Args:
        graph: float32 ModelProto; it is not changed.
        ranges: minimum and maximum of all its float tensors, from `calibrate(…, operators=None)`.
        scratch: an existing folder for passing files.
        activation_bits: 8 or 16.
        trained: ranges by tensor that training has found; they win over those of all tensors with the same values.
        wide: modules that keep 16 bits among activations of 8, with the residual sum and LayerNormalization that they
            go into. NPUs have no float beside integers: this is what `keep_float` means there.

    Raises:
        RecipeError: a tensor has no range, or one that holds a mask of unknown form.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.execution_providers.qnn.quant_config import get_qnn_qdq_config

    graph = simplify(graph, opset=OPSET)
    known = _spread(graph, ranges, trained or {})
    if changed := plain_masks(graph, known):
        graph, known = simplify(drop_unused(graph)), {**known, **changed}
    known |= fold_factors(graph, known)
    graph, known = infer_shapes(graph), _spread(graph, known, trained or {})
    _require(graph, known)
    narrow = QuantType.QUInt16 if activation_bits == 16 else QuantType.QUInt8
    config = get_qnn_qdq_config(
        graph, None, activation_type=narrow, weight_type=QuantType.QInt8, per_channel=True, init_overrides={}
    )
    # The tool gives MatMul one scale for all outputs; onnxruntime-qnn 2.7 takes one for each, as it does for Gemm.
    single = {node.input[1] for node in graph.graph.node if node.op_type == "MatMul"} & _matrices(graph)
    told = config.extra_options.get("TensorQuantOverrides", {})
    own = {name: entry for name, entry in told.items() if name not in single}
    if wide and activation_bits == 8:
        # What has 16 bits does without the scales that QNN fixes for 8, of Softmax and the like.
        widths = overrides(graph, wide_tensors(graph, wide))
        own = {**own, **{name: [{**own.get(name, [{}])[0], **entry}] for name, entry in widths.items()}}
    norms = {node.input[1] for node in graph.graph.node if node.op_type == "LayerNormalization"}
    own |= {name: [{"quant_type": QuantType.QUInt8, "symmetric": False}] for name in sorted(norms)}
    # Otherwise operators between unquantized inputs, such as the mask's, would stay float islands.
    options = {**config.extra_options, "ForceQuantizeNoInputCheck": True, "TensorQuantOverrides": own}
    return insert_pairs(
        graph, known, scratch, config.op_types_to_quantize, activation=config.activation_type, options=options
    )


def multiplied_qdq(
    graph: Any,
    ranges: Mapping[str, Range],
    scratch: Path,
    *,
    trained: Mapping[str, Range] | None = None,
    kept: Collection[str] = (),
) -> Any:
    """Quantize what goes into MatMul, Gemm and Conv, all signed with zero point 0, and leave the rest float.

    That is explicit quantization as TensorRT wants it: its fusions decide what else runs in 8 bits, and biases stay
    float. Weights have a scale per output channel.

    Args:
        graph: float32 ModelProto; it is not changed.
        ranges: minimum and maximum of the tensors that are multiplied.
        scratch: an existing folder for passing files.
        trained: ranges by tensor that training has found; they win over those of all tensors with the same values.
        kept: modules whose products stay float, with all that is within them.

    Raises:
        RecipeError: a tensor has no range.
    """
    from onnxruntime.quantization import QuantType

    graph = simplify(graph, disabled=("MatMulAddFusion",))
    known = _spread(graph, ranges, trained or {})
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "DedicatedQDQPair": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(MULTIPLIED),
        "MinimumRealRange": 0.0001,
    }
    left = kept_nodes(graph, kept, strict=False)
    paired = insert_pairs(graph, known, scratch, MULTIPLIED, activation=QuantType.QInt8, options=options, left=left)
    return _only_multiplied(paired)


def _only_multiplied(graph: Any) -> Any:
    """Give other operators that share a quantized tensor, such as residual additions, the float one back."""
    floats = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
    pairs = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.graph.node:
        if node.op_type not in (*MULTIPLIED, "DequantizeLinear"):
            for index, name in enumerate(node.input):
                node.input[index] = floats.get(pairs.get(name, ""), name)
    return drop_unused(graph)


def _matrices(graph: Any) -> set[str]:
    return {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 2}


def _spread(graph: Any, ranges: Mapping[str, Range], trained: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges of tensors that hold the same values as one whose range is known, which the fusions gave new names.

    A trained range goes to all of them: tensors with the same values share one scale.
    """
    moves = [(node.input[0], node.output[0]) for node in graph.graph.node if node.op_type in SAME_VALUES]
    learned = {name: pair for name, pair in trained.items() if name in {side for move in moves for side in move}}
    for known in (learned, whole := {**ranges, **trained}):
        for before, after in moves:
            if before in known:
                known.setdefault(after, known[before])
        for before, after in reversed(moves):
            if after in known:
                known.setdefault(before, known[after])
        whole.update(learned)
    return whole


def _require(graph: Any, ranges: Mapping[str, Range]) -> None:
    from onnx import TensorProto

    typed = infer_types(graph)
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
