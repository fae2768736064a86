"""ONNX graphs with linear layers as MatMulNBits, and the way back from the operator to its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import ModelError
from edgekd.export.names import kept_nodes, multiplied
from edgekd.export.nbits import LEAST_BLOCK, ROW_BLOCK, Blocks, Grid, Weights, grid_of_module, nearest, read
from edgekd.export.rewrite import attribute

OPERATOR, DOMAIN = "MatMulNBits", "com.microsoft"
Bytes = npt.NDArray[np.uint8]


def block_size(grid: Grid, inputs: int) -> int:
    """Inputs of one block of the operator, a power of two; several blocks may repeat the scale of a row."""
    width = grid.group or min(ROW_BLOCK, inputs)
    return max(LEAST_BLOCK, 1 << (width - 1).bit_length())


def pack(blocks: Blocks, grid: Grid) -> tuple[Bytes, Weights, Bytes | None]:
    """Weights `[N, n, bytes]`, scales `[N, n]` and zero points (None: the middle) as the operator wants them."""
    rows, inputs = blocks.steps.shape
    size = block_size(grid, inputs)
    count = -(-inputs // size)
    owner = np.minimum(np.arange(count) * size // blocks.width, blocks.scales.shape[1] - 1)
    scales, zeros = blocks.scales[:, owner], blocks.zeros[:, owner]
    steps = np.pad(blocks.steps, ((0, 0), (0, count * size - inputs))).reshape(rows, count, size)
    values = (steps + zeros[..., None]).astype(np.uint8)
    if grid.bits == 4:
        values = np.asarray(values[..., 0::2] | values[..., 1::2] << 4, np.uint8)
    return values, np.ascontiguousarray(scales), None if grid.symmetric else _packed_zeros(zeros, grid.bits)


def _packed_zeros(zeros: npt.NDArray[Any], bits: int) -> Bytes:
    """Zero points `[N, n]` as bytes `[N, ceil(n * bits / 8)]`."""
    values = zeros.astype(np.uint8)
    if bits == 8:
        return values
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return np.asarray(values[:, 0::2] | values[:, 1::2] << 4, np.uint8)


def is_smaller(rows: int, inputs: int, grid: Grid) -> bool:
    """Whether packed weights `[N, K]` take fewer bytes than float32 ones."""
    size = block_size(grid, inputs)
    count = -(-inputs // size)
    zeros = 0 if grid.symmetric else -(-count * grid.bits // 8)
    return count * (size * grid.bits // 8 + 4) + zeros < 4 * inputs


def unpack(values: Bytes, zeros: Bytes | None, bits: int, inputs: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Unsigned integers `[N, K]` and zero points `[N, n]` out of the operator's bytes."""
    rows, count = values.shape[:2]
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1)
    numbers = values.reshape(rows, -1)[:, :inputs]
    if zeros is None:
        return numbers, np.full((rows, count), 2 ** (bits - 1), np.uint8)
    points = zeros.reshape(rows, -1)
    if bits == 4:
        points = np.stack([points & 15, points >> 4], axis=-1).reshape(rows, -1)
    return numbers, points[:, :count]


def linears(graph: Any, keep_float: Collection[str] = ()) -> dict[str, Any]:
    """MatMul and Gemm of the linear layers that a weight-only form may replace, by module."""
    kept = set(kept_nodes(graph, keep_float, strict=False))
    return {name: n for name, n in multiplied(graph).items() if n.op_type != "Conv" and n.name not in kept}


def packable(graph: Any, grid: Grid) -> dict[str, Any]:
    """Those of `linears` that get smaller on a grid."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    found = {}
    for module, node in linears(graph).items():
        rows, inputs = sizes[node.input[1]] if _is_turned(node) else sizes[node.input[1]][::-1]
        if is_smaller(rows, inputs, grid_of_module(grid, module)):
            found[module] = node
    return found


def _is_turned(node: Any) -> bool:
    """Whether a product has its weights as `[N, K]`, rows are outputs."""
    return node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)


def matrix_of(graph: Any, node: Any) -> Weights:
    """The weights `[N, K]` of a MatMul or Gemm, rows are outputs."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    if node.input[1] not in tensors:
        raise ModelError(f"the weights of {node.name} are computed in the graph; export the model without that")
    values = np.asarray(numpy_helper.to_array(tensors[node.input[1]]), np.float32)
    return np.ascontiguousarray(values if _is_turned(node) else values.T)


def pack_linears(graph: Any, grid: Grid, keep_float: Collection[str] = (), *, chosen: bool = False) -> Any:
    """Quantize the weights of the linear layers of a float graph, in place.

    Args:
        graph: float32 ModelProto with the exporter's names.
        grid: how weights are rounded.
        keep_float: modules that stay as they are.
        chosen: a quantizer has put the weights on the grid already, so that they are only read; else they are rounded
            to the nearest.

    Raises:
        ModelError: no layer gets smaller, or the weights are not on the grid.
    """
    layers = {}
    for module, node in linears(graph, keep_float).items():
        matrix, own = matrix_of(graph, node), grid_of_module(grid, module)
        layers[module] = (read(matrix, own, module) if chosen else nearest(matrix, own)), own
    return replace_linears(graph, layers)


def replace_linears(graph: Any, layers: Mapping[str, tuple[Blocks, Grid]]) -> Any:
    """Put packed integers in place of the linear layers named, in place; layers that would not get smaller stay.

    Args:
        graph: float32 ModelProto with the exporter's names.
        layers: what a quantizer decided on, and the grid, by module.

    Raises:
        ModelError: there is nothing to replace.
    """
    from onnx import helper

    nodes, done = linears(graph), 0
    for module, (blocks, grid) in layers.items():
        node = nodes[module]
        rows, inputs = blocks.steps.shape
        if not is_smaller(rows, inputs, grid):
            continue
        values, scales, zeros = pack(blocks, grid)
        _replace(graph, node, values, scales, zeros, {"N": rows, "K": inputs}, grid)
        done += 1
    if not done:
        raise ModelError(
            "the model has no linear layer that gets smaller with quantized weights alone (convolutions stay as they "
            "are); choose a form with quantized activations"
        )
    if DOMAIN not in {item.domain for item in graph.opset_import}:
        graph.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    _drop_unread(graph)
    return graph


def _replace(
    graph: Any, node: Any, values: Bytes, scales: Weights, zeros: Bytes | None, sizes: Mapping[str, int], grid: Grid
) -> None:
    from onnx import helper, numpy_helper

    base = node.input[1]
    names = [node.input[0], f"{base}_Q{grid.bits}", f"{base}_scales"]
    tensors = [(names[1], values), (names[2], scales.reshape(-1))]
    if zeros is not None:
        names.append(f"{base}_zero_points")
        tensors.append((names[3], zeros.reshape(-1)))
    have = {tensor.name for tensor in graph.graph.initializer}
    graph.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in tensors if name not in have)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    if bias:
        names += [""] * (5 - len(names)) + [bias]
    made = helper.make_node(
        OPERATOR, names, list(node.output), name=node.name, domain=DOMAIN, bits=grid.bits,
        block_size=block_size(grid, sizes["K"]), accuracy_level=grid.accuracy_level, **sizes,
    )  # fmt: skip
    node.CopyFrom(made)


def _drop_unread(graph: Any) -> None:
    read = {name for node in graph.graph.node for name in node.input}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def stored(graph: Any) -> dict[str, tuple[npt.NDArray[Any], Weights, npt.NDArray[Any]]]:
    """Unsigned integers `[N, K]`, scales and zero points `[N, n]` of every MatMulNBits of a file, by module."""
    from onnx import numpy_helper

    from edgekd.export.names import module_of_name

    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    found = {}
    for node in (each for each in graph.graph.node if each.op_type == OPERATOR):
        arrays = [numpy_helper.to_array(tensors[name]) if name in tensors else None for name in node.input[1:4]]
        values, scales, zeros = (*arrays, None)[:3]
        if values is None or scales is None:
            raise ModelError(f"{node.name} has no stored weights")
        numbers, points = unpack(values, zeros, bits_of(node), attribute(node, "K", 0))
        found[module_of_name(node.name)] = (numbers, scales.reshape(values.shape[:2]), points)
    return found


def dequantized(graph: Any) -> dict[str, Weights]:
    """The weights `[N, K]` that every MatMulNBits of a file stands for, by module."""
    found, nodes = {}, linears_by_module(graph)
    for module, (numbers, scales, points) in stored(graph).items():
        inputs = numbers.shape[1]
        size = attribute(nodes[module], "block_size", 0)
        owner = np.arange(inputs) // size
        steps = numbers.astype(np.int32) - points.astype(np.int32)[:, owner]
        found[module] = np.asarray(steps * scales[:, owner], np.float32)
    return found


def bits_of(node: Any) -> int:
    """The bits of a MatMulNBits."""
    return int(attribute(node, "bits", 4))


def linears_by_module(graph: Any) -> dict[str, Any]:
    """The MatMulNBits nodes of a file, by module."""
    from edgekd.export.names import module_of_name

    return {module_of_name(node.name): node for node in graph.graph.node if node.op_type == OPERATOR}
