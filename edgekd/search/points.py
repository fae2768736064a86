"""Which small models to build and measure, so that any shape's latency can be predicted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgekd.arch import Arch, Layer
from edgekd.export.lower import calibrate, lower
from edgekd.export.onnx import export_float
from edgekd.student import Student
from edgekd.surgery import Importance, cut
from edgekd.tasks import example_feeds

if TYPE_CHECKING:
    from edgekd.context import Context

SMALL_TABLE = 1024
"""Rows of the word table in models that are only timed: a lookup costs the same, the export much less."""


def encoder_points(arch: Arch) -> list[Arch]:
    """Shapes whose latencies tell the cost of a layer, of its heads and of its neurons apart (about ten)."""
    first = arch.layers[0]
    heads, neurons = first.heads, first.neurons
    widths = [(heads, neurons)]
    widths += [(h, neurons) for h in _fractions(heads)]
    widths += [(heads, n) for n in _fractions(neurons)]
    widths += [(max(heads // 2, 1), max(neurons // 3, 1))]
    shapes = [_uniform(arch, 2, h, n) for h, n in widths]
    shapes.append(_uniform(arch, 1, heads, neurons))
    if len(arch.layers) > 2:
        deep = min(len(arch.layers), 4)
        shapes.append(_uniform(arch, deep, max(heads // 2, 1), max(neurons // 3, 1)))
        shapes.append(_uniform(arch, len(arch.layers), heads, neurons))
    return list(dict.fromkeys(shapes))


def convolution_points(arch: Arch, droppable: Sequence[bool]) -> list[Arch]:
    """For nets whose layers differ: each layer at half and at an eighth of its width, and without it where possible."""
    shapes = [arch]
    for i, layer in enumerate(arch.layers):
        for width in (layer.neurons // 2, layer.neurons // 8):
            changed = replace(layer, neurons=max(width, 1))
            shapes.append(replace(arch, layers=(*arch.layers[:i], changed, *arch.layers[i + 1 :])))
        if droppable[i]:
            shapes.append(replace(arch, layers=(*arch.layers[:i], *arch.layers[i + 1 :])))
    return list(dict.fromkeys(shapes))


def build_graph(
    student: Student, arch: Arch, importance: Importance, ctx: Context, output: Path, *, for_timing: bool = True
) -> Path:
    """Cut, export and lower one shape as it would ship; the weights need no training, time does not depend on them."""
    small = cut(student, arch, importance)
    if for_timing:
        small = _small_vocabulary(small)
    graph = export_float(small, ctx.task.name, output.with_suffix(".float.onnx"))
    try:
        ranges = None
        if ctx.lowering.startswith("int8_static"):
            feeds = example_feeds(ctx.task, ctx.processor, small.model.config.to_dict(), 4, ctx.budget.sequence)
            ranges = calibrate(graph, [feeds])
        return lower(graph, output, ctx.lowering, ranges=ranges, model_type=student.model.config.model_type)
    finally:
        graph.unlink()


def _uniform(arch: Arch, depth: int, heads: int, neurons: int) -> Arch:
    layers = tuple(
        Layer(source=layer.source, heads=min(heads, layer.heads), neurons=min(neurons, layer.neurons))
        for layer in arch.layers[:depth]
    )
    return replace(arch, layers=layers)


def _fractions(full: int) -> list[int]:
    return sorted({max(full // 2, 1), max(full // 4, 1), max(full // 12, 1)} - {full}, reverse=True)


def _small_vocabulary(student: Student) -> Student:
    table = student.family.embeddings(student.model)
    if not isinstance(table, nn.Embedding) or table.num_embeddings <= SMALL_TABLE:
        return student
    model = copy.deepcopy(student.model)
    small = nn.Embedding(SMALL_TABLE, table.embedding_dim)
    with torch.no_grad():
        small.weight.copy_(table.weight[:SMALL_TABLE])
    model.set_input_embeddings(small)
    model.config.vocab_size = SMALL_TABLE
    return replace(student, model=model)
