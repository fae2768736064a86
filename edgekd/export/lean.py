"""Graphs of few operators, each of which ONNX Runtime computes fast as it is: nothing is left to fuse at load."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgekd.export.attention import OPSET, fuse_attention, stretch_masks
from edgekd.export.embeddings import integer_tables
from edgekd.export.fusions import cheapen_gelu, keep_residuals_apart
from edgekd.export.integer import integer_linears
from edgekd.export.masks import shorten_masks
from edgekd.export.rows import keep_first_rows
from edgekd.export.sizes import fold_sizes
from edgekd.export.static import GEMM_FUSION, simplify
from edgekd.export.tokens import shorten_choices

Spans = Mapping[str, tuple[float, float]]


def lean(graph: Any) -> Any:
    """The float graph with one operator for each attention, no sizes worked out, and no rows that nobody reads.

    The numbers stay those of the graph up to the order of sums.

    Args:
        graph: float32 ModelProto; it is not changed.
    """
    made = fold_sizes(simplify(graph, opset=OPSET, disabled=(GEMM_FUSION,)))
    fuse_attention(made)
    shorten_masks(made)
    shorten_choices(made)
    keep_first_rows(made)
    stretch_masks(made)
    keep_residuals_apart(made)
    return fold_sizes(made)


def lean_integer(graph: Any, *, spans: Spans | None = None, kept: Collection[str] = (), table_bits: int = 8) -> Any:
    """The same in 8 bits: linear layers as integer products, tables of embeddings as integers.

    Args:
        graph: float32 ModelProto; it is not changed.
        spans: ranges of the inputs of linear layers by the name of their node; an input without one, or all if None,
            is quantized by its own minimum and maximum at every run.
        kept: names of nodes that stay float.
        table_bits: see `integer_tables`.
    """
    made = lean(graph)
    integer_linears(made, spans=spans, kept=kept)
    integer_tables(made, kept=kept, bits=table_bits)
    cheapen_gelu(made)
    return made
