"""Tiny ONNX models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def save(graph: onnx.GraphProto, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    """A lookup of 50 rows, masked and averaged: input_ids, attention_mask [batch_size, sequence_length]."""
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    shape = ["batch_size", "sequence_length"]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["masked"]),
        helper.make_node("ReduceMean", ["masked"], ["logits"], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", 8])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([2]), "last")],
    )
    return save(graph, tmp_path / "text" / "model.onnx")


@pytest.fixture
def image_model(tmp_path: Path) -> Path:
    """The mean of an image: pixel_values [batch_size, num_channels, height, width]."""
    shape = ["batch_size", "num_channels", "height", "width"]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["pixel_values"], ["logits"], axes=[2, 3], keepdims=0)],
        "image",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "num_channels"])],
    )
    return save(graph, tmp_path / "image" / "onnx" / "model.onnx")


@pytest.fixture
def static_model(tmp_path: Path) -> Path:
    """input_ids of the fixed shape 1×16, doubled."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["input_ids", "input_ids"], ["twice"])],
        "static",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, 16])],
        [helper.make_tensor_value_info("twice", TensorProto.INT64, [1, 16])],
    )
    return save(graph, tmp_path / "static" / "model.onnx")
