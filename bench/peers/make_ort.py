"""ONNX Runtime's own int8: dynamic after its transformer optimizer, and static in QDQ form, as its documentation says.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: dynamic quantization for transformers;
static quantization of the pre-processed graph with signed 8-bit activations and weights ("the first choice") and
weights per channel. Since that quantizes all operators it can, there is also one of matrix products alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import Examples, Made, Request, main
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import MODEL_TYPES, optimize_model


def fused(request: Request, folder: Path) -> Made:
    """Fused by the transformer optimizer, in float32; beside it the same with the embeddings left as they are."""
    output = folder / "model.onnx"
    kind = fuse(request.float, request.config, output)
    fuse(request.float, request.config, folder / "without_embeddings.onnx", embeddings=False)
    return Made(output, settings={"optimizer": kind})


def fuse(source: Path, config: dict[str, Any], output: Path, *, embeddings: bool = True) -> str:
    """Run the transformer optimizer on a float ONNX file; the type of model it was told."""
    kind = config["model_type"] if config["model_type"] in MODEL_TYPES else "bert"
    options = FusionOptions(kind)
    options.enable_embed_layer_norm = embeddings
    optimizer = optimize_model(
        str(source),
        model_type=kind,
        num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
        optimization_options=options,
    )
    optimizer.save_model_to_file(str(output))
    return kind


def dynamic(request: Request, folder: Path) -> Made:
    """Fused by the transformer optimizer, then quantized with the defaults."""
    return quantize_fused(request.float, request.config, folder)


def quantize_fused(source: Path, config: dict[str, Any], folder: Path) -> Made:
    """Fuse and quantize a float ONNX file."""
    between, output = folder / "fused.onnx", folder / "model.onnx"
    kind = fuse(source, config, between)
    # The types of what its own fused operators return are not inferred: the error that says so names this option.
    options = {"DefaultTensorType": TensorProto.FLOAT}
    quantize_dynamic(between, output, weight_type=QuantType.QInt8, extra_options=options)
    between.unlink()
    return Made(output, settings={"optimizer": kind, "weights": "QInt8", "per_channel": False})


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Calibration examples one by one, as the quantizer asks for them."""

    def __init__(self, examples: Examples) -> None:
        self.feeds: Iterator[Any] = examples.all_feeds()

    def get_next(self) -> Any:
        """The next example, None after the last."""
        return next(self.feeds, None)


def static(request: Request, folder: Path, *, operators: Sequence[str] | None, activations: QuantType) -> Made:
    """Pre-processed, then QDQ with ranges from the calibration examples; `operators` None means all it can."""
    prepared = folder / "prepared.onnx"
    try:
        quant_pre_process(request.float, prepared)
    except Exception as error:  # noqa: BLE001 - it raises no kind of its own
        print(f"again without symbolic shapes: {error}")
        quant_pre_process(request.float, prepared, skip_symbolic_shape=True)
    examples = request.examples("calibration")
    quantize_static(
        prepared,
        folder / "model.onnx",
        Calibration(examples),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=operators,
        activation_type=activations,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    prepared.unlink()
    settings = {"format": "QDQ", "activations": activations.name, "weights": "QInt8", "per_channel": True}
    settings |= {"operators": operators or "all", "method": "MinMax", "examples": len(examples)}
    return Made(folder / "model.onnx", settings=settings)


if __name__ == "__main__":
    main(
        {
            "ort_fused": fused,
            "ort_dynamic": dynamic,
            "ort_static": partial(static, operators=None, activations=QuantType.QInt8),
            "ort_static_matmul": partial(static, operators=["MatMul", "Gemm"], activations=QuantType.QUInt8),
        },
        ["onnxruntime", "onnx"],
    )
