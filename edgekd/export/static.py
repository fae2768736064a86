"""Graphs as compilers want them: known shapes, nothing computed that could be known beforehand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import ModelError, StageError
from edgekd.latency.feeds import BATCH_NAMES, SEQUENCE_NAMES, TOKEN_INPUTS

# Fuses MatMul and Add into Gemm between two Reshapes, which only some compilers like.
GEMM_FUSION = "MatMulAddFusion"
LARGEST_VALUE = 1024
"""Tensors with more numbers than this are weights: no shape follows from their values."""


def fix_shapes(
    graph: Any,
    *,
    batch: int = 1,
    sequence: int | None = None,
    sizes: Mapping[str, int | Sequence[int]] | None = None,
) -> Any:
    """A copy of an ONNX graph for one shape of its inputs, with what follows from the shape folded into constants.

    Args:
        graph: ModelProto; it is not changed.
        batch: size of free dimensions that hold the batch (by name, or the first axis).
        sequence: size of free dimensions that hold the sequence length.
        sizes: size of other free dimensions by name, or the whole shape of an input by its name.

    Raises:
        ModelError: a free dimension that none of these tells, or a fixed one that is not what was asked.
    """
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    given = dict(sizes or {})
    initial = {tensor.name for tensor in fixed.graph.initializer}
    for value in fixed.graph.input:
        if value.name not in initial:
            _fix_input(value, batch, sequence, given)
    # Intermediate and output shapes of the free graph would contradict the new ones.
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    fixed = infer_shapes(simplify(fixed, disabled=(GEMM_FUSION,)))
    if left := free_dimensions(fixed):
        raise ModelError(
            f"the shapes {', '.join(left)} depend on values, not only on the sizes of the inputs: no compiler for "
            "static shapes takes that; export the model without data-dependent shapes"
        )
    return fixed


def simplify(graph: Any, *, opset: int | None = None, disabled: Sequence[str] = ()) -> Any:
    """Constants folded, dead and idle operators gone, by onnxruntime's basic optimizer, which stays in standard ONNX.

    Args:
        graph: ModelProto; it is not changed.
        opset: convert to this version of the standard operators first, if they are older. From 20 on, Gelu is one
            of them and its parts are fused.
        disabled: names of optimizers to leave out.
    """
    import onnx
    import onnxruntime as ort

    if opset is not None and _opset(graph) < opset:
        light, heavy = _without_weights(graph)
        graph = _with_weights(onnx.version_converter.convert_version(light, opset), heavy)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "simple.onnx")
        try:
            ort.InferenceSession(
                graph.SerializeToString(), options, providers=["CPUExecutionProvider"],
                disabled_optimizers=list(disabled),
            )  # fmt: skip
        except Exception as error:
            raise StageError(f"onnxruntime cannot simplify the graph: {error}") from error
        return declare_domains(onnx.load(options.optimized_model_filepath))


def infer_shapes(graph: Any) -> Any:
    """A copy of the graph with the shape and type of every value that can be told."""
    import onnx

    inferred = onnx.ModelProto()
    inferred.CopyFrom(graph)
    del inferred.graph.value_info[:], inferred.graph.output[:]
    typed = infer_types(graph)
    inferred.graph.value_info.extend(typed.value_info)
    inferred.graph.output.extend(typed.output)
    return inferred


def infer_types(graph: Any) -> Any:
    """The GraphProto with the shape and type of every value that can be told; its large weights are inputs."""
    import onnx

    return onnx.shape_inference.infer_shapes(_without_weights(graph)[0], data_prop=True).graph


def _without_weights(graph: Any) -> tuple[Any, list[Any]]:
    """A copy with large tensors as inputs, and these tensors: onnx writes and reads all it is given."""
    import onnx
    from onnx import helper

    light = onnx.ModelProto()
    for name in ("ir_version", "producer_name", "domain"):
        setattr(light, name, getattr(graph, name))
    light.opset_import.extend(graph.opset_import)
    light.functions.extend(graph.functions)
    own = graph.graph
    for name in ("node", "input", "output", "value_info", "sparse_initializer", "quantization_annotation"):
        getattr(light.graph, name).extend(getattr(own, name))
    light.graph.name = own.name
    heavy = [tensor for tensor in own.initializer if math.prod(tensor.dims) > LARGEST_VALUE]
    named, inputs = {tensor.name for tensor in heavy}, {value.name for value in own.input}
    light.graph.initializer.extend(tensor for tensor in own.initializer if tensor.name not in named)
    light.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in heavy
        if tensor.name not in inputs
    )
    return light, heavy


def _with_weights(light: Any, heavy: Sequence[Any]) -> Any:
    """The graph with its large tensors as they were."""
    named = {tensor.name for tensor in heavy}
    inputs = [value for value in light.graph.input if value.name not in named]
    del light.graph.input[:]
    light.graph.input.extend(inputs)
    light.graph.initializer.extend(heavy)
    return light


def drop_unused(graph: Any) -> Any:
    """Remove, in place, nodes and initializers that no output needs; return the graph."""
    needed = {value.name for value in graph.graph.output}
    kept = []
    for node in reversed(graph.graph.node):
        if needed & set(node.output):
            kept.append(node)
            inner = [item.g for item in node.attribute if item.HasField("g")]
            needed |= {*node.input, *(name for part in inner for step in part.node for name in step.input)}
    del graph.graph.node[:]
    graph.graph.node.extend(kept[::-1])
    tensors = graph.graph.initializer
    for i in reversed(range(len(tensors))):  # copying those that stay would take far longer
        if tensors[i].name not in needed:
            del tensors[i]
    return graph


def free_dimensions(graph: Any) -> list[str]:
    """Inputs and outputs that have a dimension without a size, as `name [batch_size, 64]`."""
    initial = {tensor.name for tensor in graph.graph.initializer}
    found = []
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name in initial:
            continue
        shown = [str(size or name or "?") for size, name in _dimensions(value)]
        if any(not size for size, _ in _dimensions(value)):
            found.append(f"{value.name} [{', '.join(shown)}]")
    return found


def declare_domains(graph: Any) -> Any:
    """Import exactly the operator sets that nodes use: fusions forget theirs, and unused ones trouble some runtimes."""
    from onnx import helper

    versions = {imported.domain: imported.version for imported in graph.opset_import}
    used = {node.domain for node in graph.graph.node} | {""}
    del graph.opset_import[:]
    graph.opset_import.extend([helper.make_opsetid(domain, versions.get(domain, 1)) for domain in sorted(used)])
    return graph


def _opset(graph: Any) -> int:
    return max((item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")), default=1)


def _dimensions(value: Any) -> Iterator[tuple[int, str]]:
    for dim in value.type.tensor_type.shape.dim:
        yield (dim.dim_value if dim.HasField("dim_value") else 0), dim.dim_param


def _fix_input(value: Any, batch: int, sequence: int | None, given: Mapping[str, int | Sequence[int]]) -> None:
    own = list(_dimensions(value))
    whole = given.get(value.name)
    shape = [_size(value.name, axis, name, batch, sequence, given) for axis, (_, name) in enumerate(own)]
    if whole is not None and not isinstance(whole, int):
        if len(whole) != len(own):
            raise ModelError(f"input {value.name} has {len(own)} dimensions; {list(whole)} was asked")
        shape = list(whole)
    for axis, ((size, name), asked, dim) in enumerate(zip(own, shape, value.type.tensor_type.shape.dim, strict=True)):
        if size and whole is not None and asked != size:
            raise ModelError(f"axis {axis} of input {value.name} is fixed at {size}; {asked} was asked")
        if not size and not asked:
            label = name or f"axis {axis}"
            raise ModelError(
                f"input {value.name} leaves {label} open; say its size: "
                + ("a sequence length" if _is_sequence(value.name, axis, name) else f"sizes={{{label!r}: …}}")
            )
        if not size:
            dim.Clear()
            dim.dim_value = asked


def _size(
    owner: str, axis: int, name: str, batch: int, sequence: int | None, given: Mapping[str, int | Sequence[int]]
) -> int | None:
    told = given.get(name) if name else None
    if isinstance(told, int):
        return told
    if _is_sequence(owner, axis, name):
        return sequence
    return batch if name.lower() in BATCH_NAMES or axis == 0 else None


def _is_sequence(owner: str, axis: int, name: str) -> bool:
    return name.lower() in SEQUENCE_NAMES or (axis == 1 and owner in TOKEN_INPUTS)
