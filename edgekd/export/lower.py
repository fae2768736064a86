"""Lowerings: the forms a float ONNX graph can take on a target.

A lowering is a precision (`fp32`, `fp16`, `int8_dynamic`, `int8_static`, `int8_qdq`, `int16_qdq`), with or without the
`_fused` graph passes. Which one ships is decided by accuracy and by measurement, never by rule.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import RecipeError, unknown
from edgekd.export.half import to_half
from edgekd.export.onnx import quiet_export, save_checked
from edgekd.export.packed import pack_projections
from edgekd.export.qdq import full_qdq, multiplied_qdq
from edgekd.export.static import declare_domains, fix_shapes
from edgekd.target_fields import RUNTIMES

Ranges = Mapping[str, tuple[float, float]]
Feeds = Mapping[str, np.ndarray]

LOWEST = float(np.finfo(np.float32).min)
# Made from the torch model instead, see the target's device.
NOT_FROM_ONNX = ("int8_tflite",)
LOWERINGS = tuple(
    dict.fromkeys(name for runtime in RUNTIMES.values() for name in runtime.lowerings if name not in NOT_FROM_ONNX)
)
CALIBRATED = ("int8_static", "int8_qdq", "int16_qdq")
STATIC_OPERATORS = ("MatMul", "Gemm", "Conv")


def precision_of(lowering: str) -> str:
    """`int8_dynamic_fused` -> `int8`; `int16_qdq` is int8 too, by its weights: only its activations have 16 bits."""
    return "int8" if lowering == "int16_qdq" else lowering.split("_")[0]


def operators_to_calibrate(lowering: str) -> Sequence[str] | None:
    """What `calibrate` must look at for a lowering of `CALIBRATED`: types of operators, None for all."""
    return STATIC_OPERATORS if lowering == "int8_static" else None


def lower(
    source: Path,
    output: Path,
    lowering: str,
    *,
    ranges: Ranges | None = None,
    model_type: str = "",
    batch: int | None = None,
    sequence: int | None = None,
    symmetric: bool = False,
) -> Path:
    """Write `source` (float ONNX) in the form of one lowering.

    Args:
        source: float32 ONNX file.
        output: file to write.
        lowering: a name of `LOWERINGS`.
        ranges: activation ranges of `calibrate`, for the lowerings of `CALIBRATED`.
        model_type: transformers model type; chooses the attention fusion.
        batch: fix all shapes, with this batch; None leaves free dimensions free.
        sequence: the sequence length to fix shapes with, for models that have one.
        symmetric: for `int8_qdq`: zero points 0 and only the inputs of MatMul, Gemm and Conv, as TensorRT wants it.

    Raises:
        RecipeError: unknown lowering, one that is not made from ONNX, or a calibrated one without ranges.
        ModelError: shapes are to be fixed, and a free dimension is neither batch nor sequence.
    """
    import onnx

    if lowering in NOT_FROM_ONNX:
        raise RecipeError(f"{lowering} is made from the torch model by the target's compiler, not from ONNX")
    if lowering not in LOWERINGS:
        raise RecipeError(unknown("lowering", lowering, LOWERINGS))
    if lowering in CALIBRATED and ranges is None:
        raise RecipeError(f"{lowering} needs activation ranges; run the quantize stage first")
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, quiet_export():
        graph = onnx.load(source)
        if batch is not None or sequence is not None:
            graph = fix_shapes(graph, batch=batch or 1, sequence=sequence)
        graph = _transform(graph, lowering, ranges or {}, model_type, symmetric, Path(scratch))
        save_checked(declare_domains(graph), output)
    return output


def _transform(graph: Any, lowering: str, ranges: Ranges, model_type: str, symmetric: bool, scratch: Path) -> Any:
    if lowering == "fp16":
        return to_half(graph)
    if lowering == "int8_qdq" and symmetric:
        return multiplied_qdq(graph, ranges, scratch)
    if lowering in ("int8_qdq", "int16_qdq"):
        return full_qdq(graph, ranges, scratch, activation_bits=16 if lowering == "int16_qdq" else 8)
    if lowering.endswith("_fused"):
        graph = fuse(graph, model_type)
    if lowering == "fp32_fused":
        pack_projections(graph)
    if lowering.startswith("int8_dynamic"):
        graph = _dynamic(graph, scratch)
    elif lowering == "int8_static":
        graph = _static(graph, scratch, ranges)
        graph = _dynamic(graph, scratch, operators=["Gather"])
    if lowering not in ("fp32", "int8_dynamic"):
        keep_residuals_apart(graph)
    return graph


def fuse(graph: Any, model_type: str) -> Any:
    """Attention, Gelu and LayerNormalization as single operators, by onnxruntime's transformer optimizer.

    Skip-layer-norm fusion is left out: its CPU kernel is slower than the two operators it replaces. The attention
    mask stays a raw mask, so that left padding and holes keep working. Attention whose probabilities are read by
    something else too (the next layer, or the choice of tokens) stays as it is.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    kind = "vit" if model_type in ("vit", "deit") else "bert"
    options = FusionOptions(kind)
    options.enable_skip_layer_norm = False
    options.enable_bias_skip_layer_norm = False
    options.enable_embed_layer_norm = False
    options.use_raw_attention_mask(True)
    graph = copy.deepcopy(graph)
    _mark_shared(graph)
    fused: BertOnnxModel = optimize_by_fusion(graph, kind, num_heads=0, hidden_size=0, optimization_options=options)
    _unmark_shared(fused.model)
    return declare_domains(fused.model)


_MARK = "edgekd/shared"


def _mark_shared(graph: Any) -> None:
    """Put an idle Sum after every Softmax with several readers: the fusion would take the Softmax from the others."""
    from onnx import helper

    readers = Counter(name for node in graph.graph.node for name in node.input)
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.op_type == "Softmax" and readers[node.output[0]] > 1:
            name = node.output[0]
            node.output[0] = f"{name}_{_MARK}"
            nodes.append(helper.make_node("Sum", [node.output[0]], [name], name=f"{_MARK}/{name}"))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _unmark_shared(graph: Any) -> None:
    marks = {node.input[0]: node.output[0] for node in graph.graph.node if node.name.startswith(_MARK)}
    nodes = [node for node in graph.graph.node if not node.name.startswith(_MARK)]
    for node in nodes:
        if node.output and node.output[0] in marks:
            node.output[0] = marks[node.output[0]]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def keep_residuals_apart(graph: Any) -> int:
    """Write the residual `Add` before a LayerNormalization as `Sum` (the same values) and return how many there were.

    ONNX Runtime fuses Add and LayerNormalization at load time into SkipLayerNormalization, which is slower on CPU;
    it leaves Sum alone, so a session with default options stays fast.
    """
    normalized = {node.input[0] for node in graph.graph.node if node.op_type == "LayerNormalization"}
    count = 0
    for node in graph.graph.node:
        if node.op_type == "Add" and node.output[0] in normalized:
            node.op_type = "Sum"
            count += 1
    return count


def calibrate(
    source: Path, feeds: Sequence[Feeds], *, operators: Sequence[str] | None = STATIC_OPERATORS
) -> dict[str, tuple[float, float]]:
    """Minimum and maximum of every tensor that a calibrated lowering quantizes, over the given inputs.

    Args:
        source: float32 ONNX file.
        feeds: arrays by input name.
        operators: types of operators whose inputs and outputs count, None for all; see `operators_to_calibrate`.

    Raises:
        RecipeError: no inputs, or a tensor without a finite range.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    if not feeds:
        raise RecipeError("static quantization needs calibration data, and there is none")
    with tempfile.TemporaryDirectory() as scratch, quiet_export():
        calibrator = create_calibrator(
            source,
            None if operators is None else list(operators),
            augmented_model_path=str(Path(scratch) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for feed in feeds:
            calibrator.collect_data(_Reader([feed]))
        data = calibrator.compute_data()
    ranges = {}
    for name, value in data.items():
        low, high = (float(np.asarray(x).reshape(-1)[0]) for x in value.range_value)
        if operators is None and low == -np.inf:
            low = LOWEST  # a mask's "never", which the lowering rewrites
        if not (np.isfinite(low) and np.isfinite(high)):
            raise RecipeError(
                f"calibration met a tensor without a finite range ({name}); check the data for bad values"
            )
        ranges[name] = (low, high)
    return ranges


class _Reader:
    """Calibration data as onnxruntime reads it: one feed at a time, then None."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._left = list(feeds)

    def get_next(self) -> Feeds | None:
        return self._left.pop(0) if self._left else None

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Feeds:
        feed = self.get_next()
        if feed is None:
            raise StopIteration
        return feed


def _dynamic(graph: Any, scratch: Path, operators: Sequence[str] | None = None) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = scratch / "dynamic.onnx"
    quantize_dynamic(
        graph,
        target,
        op_types_to_quantize=operators and list(operators),
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return onnx.load(target)


def _static(graph: Any, scratch: Path, ranges: Ranges) -> Any:
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
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(STATIC_OPERATORS),
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model
