"""Activations of 8 and of 16 bits in one graph: which have how many, and where one becomes the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from edgekd.export.names import kept_nodes
from edgekd.export.static import infer_types

CARRIED = ("Reshape", "Transpose", "Add", "LayerNormalization")
"""Operators that compute in 16 bits what they read in 16 bits: a sum rounded to 8 would lose what was kept."""


def wide_tensors(graph: Any, modules: Collection[str]) -> set[str]:
    """Outputs of the nodes of these modules, and of what carries them on up to the next LayerNormalization."""
    chosen = set(kept_nodes(graph, modules, strict=False))
    wide: set[str] = set()
    carried: set[str] = set()
    for node in graph.graph.node:
        goes_on = node.op_type in CARRIED and carried & set(node.input)
        if node.name in chosen or goes_on:
            wide |= set(node.output)
            if node.op_type != "LayerNormalization":
                carried |= set(node.output)
    return wide


def overrides(graph: Any, wide: Collection[str]) -> dict[str, dict[str, Any]]:
    """What onnxruntime's quantizer is told of tensors that have 16 bits, or are read with another number than theirs.

    Every operator computes with as many bits as its output has.

    Args:
        graph: ModelProto with shapes and types.
        wide: tensors with 16 bits; all others have 8.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType

    typed = infer_types(graph)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
    floats = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph.graph.node:
        if node.output[0] in floats:
            for name in node.input:
                if name in floats and (name in wide) != (node.output[0] in wide):
                    readers[name].add(node.name)
    told: dict[str, dict[str, Any]] = {}
    for name in sorted(floats & (set(wide) | set(readers))):
        types = (QuantType.QUInt8, QuantType.QUInt16)
        own, other = types[name in wide], types[name not in wide]
        told[name] = {"quant_type": own}
        if readers[name]:
            told[name]["convert"] = {"quant_type": other, "recv_nodes": readers[name]}
    return told
