"""Lowerings: the forms a float ONNX graph can take on a target.

A lowering is a precision (`fp32`, `fp16`, `int8_dynamic`, `int8_static`, `int8_qdq`, `int16_qdq`) and how the graph is
written: in standard operators, `_fused` with the operators that ONNX Runtime has for transformers, or `_lean` with as
few operators as its newer versions can do with. Which one ships is decided by accuracy and by measurement, never by
rule.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import RecipeError, unknown
from edgekd.export import portable
from edgekd.export.embeddings import integer_tables
from edgekd.export.fusions import cheapen_gelu, fuse, keep_residuals_apart
from edgekd.export.half import store_half, to_half
from edgekd.export.lean import lean, lean_integer
from edgekd.export.matmul_nbits import pack_linears
from edgekd.export.names import kept_nodes, operand_ranges, spans_by_node, trained_ranges
from edgekd.export.nbits import WEIGHT_ONLY, Grid, grid_of_form
from edgekd.export.onnx import quiet_export, save_checked
from edgekd.export.packed import pack_projections
from edgekd.export.qdq import full_qdq, multiplied_qdq
from edgekd.export.ranges import LOWEST, MULTIPLIED, Feeds, Ranges, calibrate
from edgekd.export.static import declare_domains, fix_shapes
from edgekd.target_fields import RUNTIMES

__all__ = [
    "CALIBRATED", "LOWERINGS", "LOWEST", "NOT_FROM_ONNX", "Feeds", "Ranges", "calibrate", "fuse",
    "keep_residuals_apart", "lower", "operators_to_calibrate", "precision_of",
]  # fmt: skip

# Made from the torch model instead, see the target's device.
NOT_FROM_ONNX = ("int8_tflite",)
LOWERINGS = tuple(
    dict.fromkeys(name for runtime in RUNTIMES.values() for name in runtime.lowerings if name not in NOT_FROM_ONNX)
)
STATIC = ("int8_static", "int8_static_lean")
"""Forms that quantize only what linear layers and convolutions read."""
CALIBRATED = (*STATIC, "int8_qdq", "int16_qdq")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a form is made with; see `lower`.

    `ranges` and `trained` are by tensor, `spans` are those of the inputs of layers by the name of their node, `kept`
    are the names of nodes that stay float.
    """

    ranges: Ranges
    trained: Ranges
    spans: Ranges
    keep_float: Collection[str]
    kept: frozenset[str]
    table_bits: int
    model_type: str
    symmetric: bool
    weights: tuple[Grid, bool] | None
    scratch: Path


def precision_of(lowering: str) -> str:
    """`int8_dynamic_fused` -> `int8`; `int16_qdq` is int8 too, by its weights: only its activations have 16 bits."""
    return "int8" if lowering == "int16_qdq" else lowering.split("_")[0]


def operators_to_calibrate(lowering: str) -> Sequence[str] | None:
    """What `calibrate` must look at for a lowering of `CALIBRATED`: types of operators, None for all."""
    return MULTIPLIED if lowering in STATIC else None


def lower(
    source: Path,
    output: Path,
    lowering: str,
    *,
    ranges: Ranges | None = None,
    activations: Ranges | None = None,
    attention: Ranges | None = None,
    keep_float: Collection[str] = (),
    table_bits: int = 8,
    model_type: str = "",
    batch: int | None = None,
    sequence: int | None = None,
    symmetric: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> Path:
    """Write `source` (float ONNX) in the form of one lowering.

    Args:
        source: float32 ONNX file.
        output: file to write.
        lowering: a name of `LOWERINGS`.
        ranges: activation ranges of `calibrate`, for the lowerings of `CALIBRATED`.
        activations: trained ranges of the inputs of linear layers and convolutions, by module; they win over `ranges`.
        attention: trained ranges of what attention multiplies, by `module:operand`, for the `_qdq` forms; they win too.
        keep_float: modules whose products stay float in any int8 or int4 form but `int16_qdq`, with all that
            is within them.
        table_bits: of tables of embeddings in dynamic, static and weight-only forms: 8, 4, or 0, which is float32.
        model_type: transformers model type; chooses the attention fusion.
        batch: fix all shapes, with this batch; None leaves free dimensions free.
        sequence: the sequence length to fix shapes with, for models that have one.
        symmetric: for `int8_qdq`: zero points 0 and only the inputs of MatMul, Gemm and Conv, as TensorRT wants it.
        weights: for the forms of `WEIGHT_ONLY`: how weights are rounded, see `grid_of_form`.

    Raises:
        RecipeError: unknown lowering, one that is not made from ONNX, or a calibrated one without ranges.
        ModelError: shapes are to be fixed, and a free dimension is neither batch nor sequence; or `activations` or
            `keep_float` name a module that is not there.
    """
    import onnx

    if lowering in NOT_FROM_ONNX:
        raise RecipeError(f"{lowering} is made from the torch model by the target's compiler, not from ONNX")
    if lowering not in LOWERINGS:
        raise RecipeError(unknown("lowering", lowering, LOWERINGS))
    if lowering in CALIBRATED and ranges is None and not (activations and lowering in STATIC):
        raise RecipeError(f"{lowering} needs activation ranges; run the quantize stage first")
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, quiet_export():
        graph = onnx.load(source)
        trained = trained_ranges(graph, activations or {})
        if lowering not in STATIC:
            trained |= operand_ranges(graph, attention or {}, ranges or {})
        wishes = Wishes(
            ranges={**(ranges or {}), **trained},
            trained=trained,
            spans=spans_by_node(graph, ranges or {}, activations or {}),
            keep_float=keep_float,
            kept=frozenset(kept_nodes(graph, keep_float)),
            table_bits=table_bits,
            model_type=model_type,
            symmetric=symmetric,
            weights=grid_of_form(lowering, weights) if lowering in WEIGHT_ONLY else None,
            scratch=Path(scratch),
        )
        if batch is not None or sequence is not None:
            graph = fix_shapes(graph, batch=batch or 1, sequence=sequence)
        if lowering in FORMS:
            graph = FORMS[lowering](graph, wishes)
        save_checked(declare_domains(graph), output)
    return output


def _fp32_fused(graph: Any, wishes: Wishes) -> Any:
    fused = fuse(graph, wishes.model_type)
    pack_projections(fused)
    keep_residuals_apart(fused)
    return fused


def _int8_dynamic(graph: Any, wishes: Wishes) -> Any:
    return portable.dynamic(graph, wishes.scratch, kept=wishes.kept, table_bits=wishes.table_bits)


def _int8_dynamic_fused(graph: Any, wishes: Wishes) -> Any:
    fused = fuse(graph, wishes.model_type)
    kept = {*wishes.kept, *kept_nodes(fused, wishes.keep_float, strict=False)}
    made = portable.dynamic(fused, wishes.scratch, kept=kept, table_bits=wishes.table_bits)
    keep_residuals_apart(made)
    return made


def _int8_static(graph: Any, wishes: Wishes) -> Any:
    made = portable.static(
        graph,
        wishes.scratch,
        ranges={**wishes.ranges, **wishes.trained},
        spans=wishes.spans,
        kept=wishes.kept,
        table_bits=wishes.table_bits,
    )
    keep_residuals_apart(made)
    return made


def _int8_dynamic_lean(graph: Any, wishes: Wishes) -> Any:
    return lean_integer(graph, kept=wishes.kept, table_bits=wishes.table_bits)


def _int8_static_lean(graph: Any, wishes: Wishes) -> Any:
    return lean_integer(graph, spans=wishes.spans, kept=wishes.kept, table_bits=wishes.table_bits)


def _weights_alone(graph: Any, wishes: Wishes) -> Any:
    if wishes.weights is None:
        raise RecipeError("a form with quantized weights alone needs to know how they are rounded")
    grid, chosen = wishes.weights
    made = pack_linears(lean(graph), grid, wishes.keep_float, chosen=chosen)
    integer_tables(made, kept=kept_nodes(made, wishes.keep_float, strict=False), bits=wishes.table_bits)
    cheapen_gelu(made)
    return made


def _int8_qdq(graph: Any, wishes: Wishes) -> Any:
    if wishes.symmetric:
        return multiplied_qdq(
            graph, wishes.ranges, wishes.scratch, trained=wishes.trained, kept=wishes.keep_float
        )  # fmt: skip
    return full_qdq(graph, wishes.ranges, wishes.scratch, trained=wishes.trained, wide=wishes.keep_float)


def _int16_qdq(graph: Any, wishes: Wishes) -> Any:
    return full_qdq(graph, wishes.ranges, wishes.scratch, activation_bits=16, trained=wishes.trained)


FORMS: Mapping[str, Callable[[Any, Wishes], Any]] = {
    "fp32_fused": _fp32_fused,
    "fp32_lean": lambda graph, _: lean(graph),
    "fp16": lambda graph, _: to_half(graph),
    "fp16_weights": lambda graph, _: store_half(graph),
    "bf16": lambda graph, _: store_half(graph, brain=True),
    "int8_dynamic": _int8_dynamic,
    "int8_dynamic_fused": _int8_dynamic_fused,
    "int8_dynamic_lean": _int8_dynamic_lean,
    "int8_static": _int8_static,
    "int8_static_lean": _int8_static_lean,
    "int8_qdq": _int8_qdq,
    "int16_qdq": _int16_qdq,
    **dict.fromkeys(WEIGHT_ONLY, _weights_alone),
}
"""Forms that are more than the float graph."""
