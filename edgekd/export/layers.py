"""The linear layers and convolutions of a quantized graph, in whatever operators they are written, by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.export.names import MULTIPLIED, module_of
from edgekd.export.rewrite import attribute, initializers

Array = npt.NDArray[Any]

PICKING = ("Gather", "Slice", "Split")
MOVING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
BOUNDED = ("Tanh", "Sigmoid", "Softmax")
FIXED = (2.0**-15, 2.0**-16)
"""Scales that QNN demands of outputs between -1 and 1, or 0 and 1, with 16 bits."""
FUSION = ".MatMul"
"""What onnxruntime's fusion of MatMul and Add leaves at the end of a module's name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer: its integers `[out, in]` (None: float weights), their scale by output and zero points.

    `scale` and `zero` are those of its input, None where it is quantized at every run or not at all. `is_given`: no
    training decides on them, because the input was picked from a larger tensor (the first token, say) and has that
    one's scale, or because it has the scale that QNN demands of an operator with 16 bits.
    """

    module: str
    integers: Array | None
    weight_scale: Array
    weight_zero: Array | None
    scale: Array | None
    zero: Array | None
    is_given: bool = False


def quantized_layers(graph: Any) -> Iterator[Layer]:
    """Every product with a constant matrix, and every convolution, that comes from a module."""
    reader = _Reader(graph)
    for node in graph.graph.node:
        if found := _READERS.get(node.op_type):
            layer = found(reader, node)
            if layer is not None and layer.module:
                yield layer


class _Reader:
    """Constants and makers of a graph's tensors."""

    def __init__(self, graph: Any) -> None:
        self.tensors = initializers(graph)
        self.makers = {name: node for node in graph.graph.node for name in node.output}

    def value(self, name: str) -> Array | None:
        """The values of a constant; None if it is none."""
        from onnx import numpy_helper

        tensor = self.tensors.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def pair(self, name: str) -> tuple[Array | None, Array | None, str]:
        """Scale and zero point of the DequantizeLinear that makes a tensor, and what that reads."""
        node = self.makers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None, None, name
        zero = self.value(node.input[2]) if len(node.input) > 2 else None
        return self.value(node.input[1]), zero, str(node.input[0])

    def is_given(self, name: str, scale: Array | None) -> bool:
        """Whether the scale of a dequantized tensor comes from elsewhere, see `Layer`."""
        steps = ("DequantizeLinear", "QuantizeLinear")
        while (node := self.makers.get(name)) is not None and node.op_type in (*steps, *MOVING):
            name = node.input[0]
        if node is None or scale is None:
            return False
        if node.op_type in PICKING:
            before = self.makers.get(node.input[0])
            return before is not None and before.op_type == "DequantizeLinear"
        return node.op_type in BOUNDED and float(scale) in FIXED

    def at(self, node: Any, index: int) -> Array | None:
        """The constant that is an input of a node, if there is one."""
        return self.value(node.input[index]) if len(node.input) > index and node.input[index] else None


def module_of_layer(node: Any) -> str:
    """The module of a product, also where fusions have added to its name."""
    return module_of(node).removesuffix(FUSION)


def _dequantized(reader: _Reader, node: Any) -> Layer | None:
    """MatMul, Gemm or Conv, with Q/DQ pairs or in float."""
    scale, zero, source = reader.pair(node.input[1])
    weight = reader.value(source)
    if weight is None or weight.ndim < 2:
        return None
    made, start, _ = reader.pair(node.input[0])
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
    rows = weight.T if transposed else weight.reshape(len(weight), -1)
    return Layer(
        module=module_of_layer(node),
        integers=None if scale is None else rows,
        weight_scale=np.ones(1, np.float32) if scale is None else scale,
        weight_zero=zero,
        scale=made,
        zero=np.zeros((), np.uint8) if made is not None and start is None else start,
        is_given=reader.is_given(node.input[0], made),
    )


def _integer(reader: _Reader, node: Any) -> Layer | None:
    """MatMulInteger and ConvInteger of onnxruntime's quantizer, which multiplies by the scale later."""
    weight = reader.at(node, 1)
    scale = reader.value(str(node.input[1]).removesuffix("_quantized") + "_scale")
    if weight is None or scale is None:
        return None
    rows = weight.T if node.op_type == "MatMulInteger" else weight.reshape(len(weight), -1)
    return Layer(
        module=module_of_layer(node), integers=rows, weight_scale=scale, weight_zero=reader.at(node, 3),
        scale=None, zero=None,
    )  # fmt: skip


def _to_float(reader: _Reader, node: Any) -> Layer | None:
    """MatMulIntegerToFloat: integers, two scales, two zero points and a bias in one operator."""
    weight, scale = reader.at(node, 1), reader.at(node, 3)
    if weight is None or scale is None:
        return None
    return Layer(
        module=module_of_layer(node), integers=weight.T, weight_scale=scale, weight_zero=reader.at(node, 5),
        scale=reader.at(node, 2), zero=reader.at(node, 4),
    )  # fmt: skip


_READERS: Mapping[str, Any] = {
    **dict.fromkeys(MULTIPLIED, _dequantized),
    **dict.fromkeys(("MatMulInteger", "ConvInteger"), _integer),
    "MatMulIntegerToFloat": _to_float,
}
