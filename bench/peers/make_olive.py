"""Olive: one workflow that converts the teacher's folder, optimizes it as a transformer and quantizes it for the CPU.

https://microsoft.github.io/Olive, the examples of BERT on the CPU: OnnxConversion, OrtTransformersOptimization,
OnnxDynamicQuantization or OnnxStaticQuantization.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Examples, Made, Request, main

os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
from olive.data.registry import Registry
from olive.workflows import run


class Calibration(torch.utils.data.Dataset[Any]):
    """Calibration examples, each a batch of one, with their labels."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Any]:
        feeds = {name: torch.from_numpy(values) for name, values in self.examples.feeds(index).items()}
        return feeds, torch.from_numpy(np.asarray(self.examples.labels[index : index + 1]))


@Registry.register_dataset("calibration_examples")  # type: ignore[untyped-decorator]
def calibration_examples(file: str, **_: Any) -> Calibration:
    """The data set that the workflow names."""
    return Calibration(Examples(Path(file)))


def workflow(request: Request, folder: Path, *, mode: str) -> Made:
    """Run the workflow; the model it puts out."""
    config, output = request.config, folder / "model"
    fuse = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
    kinds = ["OnnxConversion", "OrtTransformersOptimization"]
    quantize: dict[str, Any] = {"type": "OnnxDynamicQuantization"}
    if mode == "static":
        quantize = {"type": "OnnxStaticQuantization", "data_config": "calibration"}
    passes = {
        "conversion": {"type": kinds[0]},
        "optimization": {"type": kinds[1], "model_type": config["model_type"], **fuse},
        "quantization": dict(quantize),
    }
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    data = {
        "name": "calibration",
        "load_dataset_config": {
            "type": "calibration_examples",
            "params": {"file": str(request.inputs / "calibration-data.npz")},
        },
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
    }
    run({
        "input_model": {"type": "HfModel", "model_path": str(request.teacher), "task": "text-classification"},
        "systems": {"machine": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "data_configs": [data],
        "passes": passes,
        "engine": {
            "host": "machine", "target": "machine", "cache_dir": str(folder / "cache"), "output_dir": str(output),
        },
    })  # fmt: skip
    file = next(output.rglob("*.onnx"))
    return Made(file, settings={"passes": [*kinds, quantize["type"]], "mode": mode})


if __name__ == "__main__":
    main(
        {"olive_dynamic": partial(workflow, mode="dynamic"), "olive_static": partial(workflow, mode="static")},
        ["olive-ai", "onnxruntime", "onnx", "torch", "transformers"],
    )
