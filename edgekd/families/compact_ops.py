"""Reshaping, choosing and gathering of tokens; a traced graph gets each as few operators without sums over shapes.

The exporter would write the sizes of every batch out: about ten operators for each reshape, which take longer than a
small 8-bit layer can afford.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split_heads(states: Tensor, heads: int, head_dim: int) -> Tensor:
    """`[B, S, heads * head_dim]` -> `[B, heads, S, head_dim]`."""
    return _reshaped(states, (heads, head_dim)).transpose(1, 2)


def join_heads(context: Tensor, width: int) -> Tensor:
    """`[B, heads, S, head_dim]` -> `[B, S, width]`, the heads side by side."""
    return _reshaped(context.transpose(1, 2), (width,))


def choose(scores: Tensor, count: int) -> Tensor:
    """Positions `[B, min(count, S)]` of the largest scores `[B, S]`, ascending; of equal ones any."""
    if tracing():
        return _traced(_Choose, scores, count)
    return scores.topk(min(count, scores.shape[1]), dim=1).indices.sort(dim=1).values


def flat_rows(chosen: Tensor, states: Tensor) -> Tensor:
    """Rows `[B, k]` of the tokens `chosen [B, k]` once states `[B, S, D]` are laid out as `[B * S, D]`."""
    if tracing():
        return _traced(_FlatRows, chosen, states)
    return _flat_rows(chosen, states)


def pick(states: Tensor, rows: Tensor) -> Tensor:
    """Rows of `flat_rows` of states `[B, S, D]`: `[B, k, D]`. Whole rows are copied, which runtimes do fast."""
    if tracing():
        return _traced(_Pick, states, rows, int(states.shape[-1]))
    return states.flatten(0, 1)[rows]


def tracing() -> bool:
    """Whether a graph is being made of what is computed."""
    return torch._C._get_tracing_state() is not None


def _reshaped(states: Tensor, tail: tuple[int, ...]) -> Tensor:
    """`[B, S, …]` -> `[B, S, *tail]`."""
    if tracing():
        return _traced(_Reshape, states, tail)
    return states.reshape(states.shape[0], states.shape[1], *tail)


def _traced(operator: Any, *arguments: Any) -> Tensor:
    made: Tensor = operator.apply(*arguments)
    return made


class _Reshape(torch.autograd.Function):
    """ONNX copies the size where the new shape has a zero."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tail: tuple[int, ...]) -> Tensor:
        return states.reshape(*states.shape[:2], *tail)

    @staticmethod
    def symbolic(g: Any, states: Any, tail: tuple[int, ...]) -> Any:
        return _typed(g.op("Reshape", states, _constant(g, [0, -1, *tail])), states, (None, None, *tail))


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        return scores.topk(min(count, int(scores.shape[1])), dim=1).indices.sort(dim=1).values

    @staticmethod
    def symbolic(g: Any, scores: Any, count: int) -> Any:
        size = g.op("Min", g.op("Shape", scores, start_i=1, end_i=2), _constant(g, [count]))
        chosen = g.op("TopK", scores, size, axis_i=1, largest_i=1, sorted_i=0, outputs=2)[1]
        return g.op("TopK", chosen, size, axis_i=1, largest_i=0, sorted_i=1, outputs=2)[0]


class _FlatRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: Tensor, states: Tensor) -> Tensor:
        return _flat_rows(chosen, states)

    @staticmethod
    def symbolic(g: Any, chosen: Any, states: Any) -> Any:
        sizes = g.op("Shape", states, start_i=0, end_i=2)
        tokens = g.op("Gather", sizes, _constant(g, 1))
        total = g.op("ReduceProd", sizes, keepdims_i=0)
        first = g.op("Range", _constant(g, 0), total, tokens)
        return g.op("Add", chosen, g.op("Unsqueeze", first, _constant(g, [1])))


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, width: int) -> Tensor:
        return states.flatten(0, 1)[rows]

    @staticmethod
    def symbolic(g: Any, states: Any, rows: Any, width: int) -> Any:
        flat = g.op("Reshape", states, _constant(g, [-1, width]))
        return _typed(g.op("Gather", flat, rows), states, (None, None, width))


def _flat_rows(chosen: Tensor, states: Tensor) -> Tensor:
    batch, tokens = states.shape[:2]
    return chosen + torch.arange(0, batch * tokens, tokens, device=chosen.device)[:, None]


def _constant(g: Any, values: int | list[int]) -> Any:
    return g.op("Constant", value_t=torch.tensor(values, dtype=torch.long))


def _typed(value: Any, like: Any, sizes: tuple[int | None, ...]) -> Any:
    """Tell the exporter the sizes it does not work out by itself."""
    return value.setType(like.type().with_sizes(list(sizes)))
