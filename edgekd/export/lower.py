"""Lowerings: the forms a float ONNX graph can take on an ONNX Runtime target.

A lowering is a precision (`fp32`, `int8_dynamic`, `int8_static`), with or without the `_fused` graph passes. Which
one ships is decided by accuracy and by measurement, never by rule.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import RecipeError, unknown
from edgekd.export.onnx import quiet_export, save_checked

Ranges = Mapping[str, tuple[float, float]]
Feeds = Mapping[str, np.ndarray]

LOWERINGS = ("fp32", "fp32_fused", "int8_dynamic", "int8_dynamic_fused", "int8_static")
STATIC_OPERATORS = ("MatMul", "Gemm", "Conv")


def precision_of(lowering: str) -> str:
    """`int8_dynamic_fused` -> `int8`."""
    return lowering.split("_")[0]


def lower(source: Path, output: Path, lowering: str, *, ranges: Ranges | None = None, model_type: str = "") -> Path:
    """Write `source` (float ONNX) in the form of one lowering.

    Args:
        source: float32 ONNX file.
        output: file to write.
        lowering: a name of `LOWERINGS`.
        ranges: activation ranges of `calibrate`, for the static lowerings.
        model_type: transformers model type; chooses the attention fusion.

    Raises:
        RecipeError: unknown lowering, or a static one without ranges.
    """
    import onnx

    if lowering not in LOWERINGS:
        raise RecipeError(unknown("lowering", lowering, LOWERINGS))
    if lowering.startswith("int8_static") and ranges is None:
        raise RecipeError(f"{lowering} needs activation ranges; run the quantize stage first")
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, quiet_export():
        graph = onnx.load(source)
        if lowering.endswith("_fused"):
            graph = fuse(graph, model_type)
        if lowering.startswith("int8_dynamic"):
            graph = _dynamic(graph, Path(scratch))
        elif lowering.startswith("int8_static"):
            graph = _static(graph, Path(scratch), ranges or {})
            graph = _dynamic(graph, Path(scratch), operators=["Gather"])
        if lowering not in ("fp32", "int8_dynamic"):
            keep_residuals_apart(graph)
        save_checked(_declare_domains(graph), output)
    return output


def fuse(graph: Any, model_type: str) -> Any:
    """Attention, Gelu and LayerNormalization as single operators, by onnxruntime's transformer optimizer.

    Skip-layer-norm fusion is left out: its CPU kernel is slower than the two operators it replaces. The attention
    mask stays a raw mask, so that left padding and holes keep working.
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
    fused: BertOnnxModel = optimize_by_fusion(
        copy.deepcopy(graph), kind, num_heads=0, hidden_size=0, optimization_options=options
    )
    return _declare_domains(fused.model)


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


def calibrate(source: Path, feeds: Sequence[Feeds]) -> dict[str, tuple[float, float]]:
    """Minimum and maximum of every tensor that a static lowering quantizes, over the given inputs.

    Raises:
        RecipeError: no inputs, or a tensor without a finite range.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    if not feeds:
        raise RecipeError("static quantization needs calibration data, and there is none")
    with tempfile.TemporaryDirectory() as scratch, quiet_export():
        calibrator = create_calibrator(
            source,
            list(STATIC_OPERATORS),
            augmented_model_path=str(Path(scratch) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for feed in feeds:
            calibrator.collect_data(_Reader([feed]))
        data = calibrator.compute_data()
    ranges = {}
    for name, value in data.items():
        low, high = (float(np.asarray(x).reshape(-1)[0]) for x in value.range_value)
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


def _declare_domains(graph: Any) -> Any:
    """Import exactly the operator sets that nodes use: fusions forget theirs, and unused ones trouble some runtimes."""
    from onnx import helper

    versions = {imported.domain: imported.version for imported in graph.opset_import}
    used = {node.domain for node in graph.graph.node} | {""}
    del graph.opset_import[:]
    graph.opset_import.extend([helper.make_opsetid(domain, versions.get(domain, 1)) for domain in sorted(used)])
    return graph
