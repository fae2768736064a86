"""From a shape to the file that is timed: cut, exported and lowered as it would ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body
from edgekd.export.lower import CALIBRATED, Ranges, calibrate, lower, operators_to_calibrate
from edgekd.export.onnx import export_float
from edgekd.latency.cell import Frame
from edgekd.surgery import cut

DEFAULT_SEQUENCE = 64


def build_graphs(
    body: Body, arch: Arch, outputs: Mapping[Path, Frame], *, static: bool = False, symmetric: bool = False
) -> None:
    """Write one shape of a body in several forms; `outputs` says for each file what it is for.

    With `static` the shapes are fixed to those of the frame. Ranges of activations are found on made-up inputs, which
    time does not depend on.

    Raises:
        StageError: a graph cannot be exported.
    """
    first = next(iter(outputs))
    graph = export_float(cut(body.student, arch, body.importance), body.task, first.with_suffix(".float.onnx"))
    try:
        if body.image is not None:
            fix_image(graph, channels(body), body.image)
        for output, frame in outputs.items():
            lower(
                graph,
                output,
                frame.lowering,
                ranges=_ranges(graph, body, frame) if frame.lowering in CALIBRATED else None,
                model_type=body.model_type,
                symmetric=symmetric,
                **_fixed(body, frame) if static else {},
            )
    finally:
        graph.unlink(missing_ok=True)


def _ranges(graph: Path, body: Body, frame: Frame) -> Ranges:
    feeds = example(body, batch=frame.batch, sequence=frame.sequence or DEFAULT_SEQUENCE)
    return calibrate(graph, [feeds], operators=operators_to_calibrate(frame.lowering))


def _fixed(body: Body, frame: Frame) -> dict[str, Any]:
    return {"batch": frame.batch, **({"sequence": frame.sequence} if body.image is None else {})}


def example(body: Body, *, batch: int = 4, sequence: int = 64) -> dict[str, Any]:
    """Made-up inputs of a body: int64 ids [batch, sequence], or float32 pixels [batch, 3, image, image]."""
    rng = np.random.default_rng(0)
    if body.image is not None:
        return {"pixel_values": rng.normal(size=(batch, channels(body), body.image, body.image)).astype(np.float32)}
    ids = rng.integers(0, int(body.student.model.config.vocab_size), size=(batch, sequence))
    names: Sequence[str] = ("input_ids", "attention_mask", "token_type_ids")
    feeds = dict(zip(names, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
    return feeds if getattr(body.student.model.config, "type_vocab_size", 0) > 1 else dict(list(feeds.items())[:2])


def channels(body: Body) -> int:
    """Colour channels of a body's images."""
    return int(getattr(body.student.model.config, "num_channels", 3))


def fix_image(path: Path, colours: int, side: int) -> None:
    """State channels and side of the images in the graph, as a shipped one does."""
    import onnx

    graph = onnx.load(path)
    for value in graph.graph.input:
        if value.name == "pixel_values":
            for dimension, size in zip(value.type.tensor_type.shape.dim[1:], (colours, side, side), strict=True):
                dimension.Clear()
                dimension.dim_value = size
    onnx.save(graph, path)
