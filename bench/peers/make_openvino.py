"""OpenVINO's own export and NNCF's post-training quantization, with fixed and with free shapes.

https://docs.openvino.ai, "Basic Quantization Flow": `nncf.quantize` with the model type `TRANSFORMER`, 300 examples.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import nncf
import openvino
from common import Made, Request, main


def export(request: Request, folder: Path, *, fixed: bool, quantized: bool) -> Made:
    """The float graph read by OpenVINO, with fixed shapes and quantized as asked, saved with the defaults."""
    model = openvino.Core().read_model(request.float)
    examples = request.examples("calibration", padded=fixed)
    if fixed:
        model.reshape({name: list(values.shape) for name, values in examples.feeds(0).items()})
    settings: dict[str, Any] = {}
    if quantized:
        count = min(300, len(examples))
        data = nncf.Dataset([examples.feeds(i) for i in range(count)])
        model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=count)
        settings = {"model_type": "transformer", "preset": "default", "examples": count}
    file = folder / "model.xml"
    openvino.save_model(model, file)
    return Made(file, engine="openvino", fixed=fixed, settings=settings)


if __name__ == "__main__":
    main(
        {
            "openvino_float": partial(export, fixed=False, quantized=False),
            "openvino_float_fixed": partial(export, fixed=True, quantized=False),
            "nncf": partial(export, fixed=False, quantized=True),
            "nncf_fixed": partial(export, fixed=True, quantized=True),
        },
        ["nncf", "openvino"],
    )
