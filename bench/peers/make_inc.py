"""neural-compressor's quantization of ONNX models, which it has moved to a package of its own (onnx-neural-compressor).

neural-compressor itself, from 3.8 on, takes torch models only. The package is of 2024 and needs ONNX Runtime of then to
quantize; its files run in the same ONNX Runtime as all others. As in its examples of BERT, it gets the graph that ONNX
Runtime's transformer optimizer has fused all but the embeddings of (from `ort_fused`, of the present version: that of
2024 does not find the attention in today's export). Settings are the defaults, but QDQ as the static form.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Examples, Made, Request, main
from onnx_neural_compressor.data_reader import CalibrationDataReader
from onnx_neural_compressor.quantization import QuantFormat, quantize
from onnx_neural_compressor.quantization.config import DynamicQuantConfig, StaticQuantConfig


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Calibration examples one by one, as often as the quantizer goes through them."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.rewind()

    def rewind(self) -> None:
        """Begin with the first example."""
        self.feeds: Iterator[Any] = self.examples.all_feeds()

    def get_next(self) -> Any:
        """The next example, None after the last."""
        return next(self.feeds, None)


def dynamic(request: Request, folder: Path) -> Made:
    """Ranges of activations found when it runs."""
    return made(request, folder, DynamicQuantConfig(), {"mode": "dynamic"})


def static(request: Request, folder: Path) -> Made:
    """Ranges of activations from the calibration examples."""
    examples = request.examples("calibration")
    config = StaticQuantConfig(
        calibration_data_reader=Calibration(examples),
        quant_format=QuantFormat.QDQ,
        calibration_sampling_size=len(examples),
    )
    return made(request, folder, config, {"mode": "static", "format": "QDQ", "examples": len(examples)})


def made(request: Request, folder: Path, config: Any, settings: dict[str, Any]) -> Made:
    """Quantize the fused graph."""
    source, output = request.out / "ort_fused" / "without_embeddings.onnx", folder / "model.onnx"
    if not source.is_file():
        raise FileNotFoundError("it needs ort_fused: add the peer ort")
    quantize(str(source), str(output), config)
    return Made(output, settings=settings)


if __name__ == "__main__":
    main({"inc_dynamic": dynamic, "inc_static": static}, ["onnx-neural-compressor", "onnxruntime", "onnx"])
