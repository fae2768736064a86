"""Does a quantized graph have the very integers and scales that training used? Layer by layer, nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import ModelError
from edgekd.export.factors import factors_of
from edgekd.export.integer import quantize_weight
from edgekd.export.layers import Layer, quantized_layers
from edgekd.export.matmul_nbits import dequantized
from edgekd.export.nbits import Grid, grid_of_module, nearest, read

Array = npt.NDArray[Any]
Range = tuple[float, float]

CLOSE = 1e-5
"""Relative difference of scales that float32 rounding explains."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """What of a module is not as it was trained: `what` is, for instance, `weight integers`."""

    module: str
    what: str
    expected: str
    found: str

    def describe(self) -> str:
        """`MODULE: WHAT is FOUND, not EXPECTED`."""
        return f"{self.module}: {self.what}: {self.found}, expected {self.expected}"


@dataclass(frozen=True, kw_only=True)
class ScaleCheck:
    """Modules whose weights and whose activations were compared, what differs, and modules that were not found.

    `floating` are modules that the graph computes with float weights. `given` are modules whose input has a scale that
    no training decides on: that of a larger tensor it is a part of, or one that the target demands.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...]
    mismatches: tuple[Mismatch, ...]
    given: tuple[str, ...]
    floating: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs, and there was something to compare: float layers need no comparison."""
        return not self.mismatches and bool(self.weights or self.floating or not self.absent)

    def describe(self) -> str:
        """What to tell the user, in one line."""
        told = f"{len(self.weights)} weights and {len(self.activations)} activation scales compared"
        if self.mismatches:
            shown = "; ".join(each.describe() for each in self.mismatches[:3])
            told += f", {len(self.mismatches)} differ: {shown}" + ("; …" if len(self.mismatches) > 3 else "")
        if self.given:
            told += f"; {len(self.given)} with a scale that is not trained"
        if self.floating:
            told += f"; {len(self.floating)} in float"
        if self.absent:
            told += f"; not found in the graph: {', '.join(self.absent[:3])}" + (", …" if len(self.absent) > 3 else "")
        return told

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return {**vars(self), "mismatches": [vars(each) for each in self.mismatches]}


def check_scales(
    graph: Any | Path,
    weights: Mapping[str, Array],
    activations: Mapping[str, Range] | None = None,
    packed: tuple[Grid, bool] | None = None,
) -> ScaleCheck:
    """Compare a lowered graph with the snapped weights and the ranges of training.

    A weight must have the integers that its channels' largest magnitudes give, a zero point of 0 and that scale; a
    static activation the scale and zero point of its range, in as many bits as the graph has. Activations that the
    graph quantizes at every run have no scale to compare. Weights packed into MatMulNBits must stand for the very
    numbers that their grid gives.

    Args:
        graph: ModelProto or file of any form with integer weights.
        weights: float weight of each linear layer and convolution, `[out, in, …]`, as torch has it, by module.
        activations: trained range of the input of each, by module.
        packed: the grid of weights in MatMulNBits, and whether the weights are on it already; see `grid_of_form`.
    """
    import onnx

    model = onnx.load(str(graph)) if isinstance(graph, Path) else graph
    factors = factors_of(model)
    layers = {layer.module: layer for layer in quantized_layers(model)}
    stored = dequantized(model) if packed else {}
    inside = [name for name in weights if name in stored]
    ranges = activations or {}
    seen = [name for name in weights if name in layers]
    integer = [name for name in seen if layers[name].integers is not None]
    scaled = [name for name in ranges if name in layers and layers[name].scale is not None]
    static = [name for name in scaled if not layers[name].is_given]
    found = [
        each
        for name in seen
        for each in (
            *(_weight_differs(layers[name], weights[name], factors.get(name, 1.0)) if name in integer else ()),
            *(_activation_differs(layers[name], ranges[name]) if name in static else ()),
        )
    ]
    if packed:
        found += [each for name in inside for each in _packed_differs(name, stored[name], weights[name], *packed)]
    return ScaleCheck(
        weights=(*integer, *inside),
        activations=tuple(static),
        mismatches=tuple(found),
        given=tuple(name for name in scaled if layers[name].is_given),
        floating=tuple(name for name in seen if name not in integer),
        absent=tuple(name for name in weights if name not in layers and name not in stored),
    )


def _packed_differs(module: str, found: Array, weight: Array, grid: Grid, chosen: bool) -> Iterator[Mismatch]:
    own = grid_of_module(grid, module)
    try:
        expected = (read(weight, own, module) if chosen else nearest(weight, own)).values()
    except ModelError as error:
        yield Mismatch(module=module, what="weights", expected="weights on their grid", found=str(error))
        return
    if found.shape != expected.shape:
        yield Mismatch(
            module=module, what="weight shape", expected=str(list(expected.shape)), found=str(list(found.shape))
        )
    elif len(wrong := np.argwhere(found != expected)):
        place = tuple(int(index) for index in wrong[0])
        yield Mismatch(
            module=module, what=f"packed weights, {len(wrong)} of {found.size}",
            expected=f"{expected[place]:.6g} at {list(place)}", found=f"{found[place]:.6g}",
        )  # fmt: skip


def _weight_differs(layer: Layer, weight: Array, factor: float) -> Iterator[Mismatch]:
    rows = weight.reshape(len(weight), -1).astype(np.float32) * np.float32(factor)
    integers, scales = quantize_weight(rows.T)
    if layer.integers is None or layer.integers.shape != integers.T.shape:
        found = "none" if layer.integers is None else str(list(layer.integers.shape))
        yield Mismatch(module=layer.module, what="weight shape", expected=str(list(integers.T.shape)), found=found)
        return
    wrong = np.argwhere(layer.integers != integers.T)
    if len(wrong):
        place = tuple(int(index) for index in wrong[0])
        yield Mismatch(
            module=layer.module, what=f"weight integers, {len(wrong)} of {layer.integers.size}",
            expected=f"{integers.T[place]} at {list(place)}", found=str(layer.integers[place]),
        )  # fmt: skip
    if layer.weight_zero is not None and np.any(layer.weight_zero):
        shown = str(layer.weight_zero.reshape(-1)[np.flatnonzero(layer.weight_zero)[0]])
        yield Mismatch(module=layer.module, what="weight zero point", expected="0", found=shown)
    # A channel of zeros may have any scale.
    there = rows.any(axis=1)
    own = np.broadcast_to(np.abs(layer.weight_scale), scales.shape)
    off = np.flatnonzero(there & (np.abs(own - scales) > CLOSE * scales))
    if len(off):
        yield Mismatch(
            module=layer.module, what=f"weight scale, {len(off)} of {len(scales)} channels",
            expected=f"{scales[off[0]]:.6g} of channel {off[0]}", found=f"{own[off[0]]:.6g}",
        )  # fmt: skip


def _activation_differs(layer: Layer, span: Range) -> Iterator[Mismatch]:
    if layer.scale is None or layer.zero is None:
        return
    scale, zero = expected_scale(span, layer.zero.dtype)
    if abs(float(layer.scale) - scale) > CLOSE * scale:
        yield Mismatch(
            module=layer.module, what="activation scale", expected=f"{scale:.6g}", found=f"{float(layer.scale):.6g}"
        )
    if int(layer.zero) != zero:
        yield Mismatch(
            module=layer.module, what="activation zero point", expected=str(zero), found=str(int(layer.zero))
        )


def expected_scale(span: Range, kind: Any) -> tuple[float, int]:
    """Scale and zero point of a range for an integer type: symmetric for signed ones, else with its own zero point.

    The range is widened to contain 0, as training under quantization does.
    """
    limits = np.iinfo(kind)
    low, high = np.float32(min(span[0], 0.0)), np.float32(max(span[1], 0.0))
    if limits.min < 0:
        scale = np.float32(max(-low, high)) / np.float32(limits.max)
        return float(scale) if scale > 0 else 1.0, 0
    scale = np.float32(high - low) / np.float32(limits.max)
    if not scale > 0:
        return 1.0, 0
    return float(scale), int(np.clip(np.rint(-low / scale), limits.min, limits.max))


def weights_of(model: Any) -> dict[str, Array]:
    """The weights of linear layers and convolutions of a torch model, `[out, in, …]`, by module.

    Convolutions of a model with batch norms are left out: the export multiplies those into them.
    """
    from torch import nn

    kinds: Any = (nn.Linear, nn.Conv2d)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        kinds = (nn.Linear,)
    return {
        name: module.weight.detach().float().cpu().numpy()
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
