"""Forward passes of layers that keep fewer tokens or share attention, over the modules that transformers made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.families.compact_flow import Flow, most_attended
from edgekd.families.compact_ops import flat_rows, join_heads, pick, split_heads, tracing
from edgekd.families.encoder import Places


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a layer is called with: hidden states `[B, S, D]`, a mask in one of three forms, and two rarer wishes."""

    states: Tensor
    mask: Tensor | None = None
    head_mask: Tensor | None = None
    attentions: bool = False


@dataclass(frozen=True, kw_only=True)
class Block:
    """How a family's layer is put together around its attention.

    `before(layer, states)` is what attention reads; `after(layer, context, states)` the rest of the layer;
    `answer(output, probabilities, wanted)` the form in which the encoder expects it. `activation` is the path of the
    inner activation, `activation_key` its key in the config. `masked` tells whether the layers get a mask.
    """

    activation: str
    activation_key: str
    masked: bool
    call: Callable[..., Call]
    before: Callable[[Any, Tensor], Tensor]
    after: Callable[[Any, Tensor, Tensor], Tensor]
    answer: Callable[[Tensor, Tensor | None, bool], Any]


def _bert_call(
    states: Tensor, mask: Tensor | None = None, head_mask: Tensor | None = None, *rest: Any, **named: Any
) -> Call:
    wanted = bool(named.get("output_attentions"))
    mask, head_mask = named.get("attention_mask", mask), named.get("head_mask", head_mask)
    return Call(states=states, mask=mask, head_mask=head_mask, attentions=wanted)


def _bert_after(layer: Any, context: Tensor, states: Tensor) -> Tensor:
    output: Tensor = layer.feed_forward_chunk(layer.attention.output(context, states))
    return output


def _distilbert_call(
    x: Tensor, attn_mask: Tensor | None = None, head_mask: Tensor | None = None, output_attentions: bool = False
) -> Call:
    return Call(states=x, mask=attn_mask, head_mask=head_mask, attentions=output_attentions)


def _distilbert_after(layer: Any, context: Tensor, states: Tensor) -> Tensor:
    states = layer.sa_layer_norm(layer.attention.out_lin(context) + states)
    output: Tensor = layer.output_layer_norm(layer.ffn(states) + states)
    return output


def _vit_after(layer: Any, context: Tensor, states: Tensor) -> Tensor:
    states = layer.attention.output(context, states) + states
    output: Tensor = layer.output(layer.intermediate(layer.layernorm_after(states)), states)
    return output


BLOCKS: dict[str, Block] = {
    "bert": Block(
        activation="intermediate.intermediate_act_fn",
        activation_key="hidden_act",
        masked=True,
        call=_bert_call,
        before=lambda layer, states: states,
        after=_bert_after,
        answer=lambda output, probabilities, wanted: (output, probabilities),
    ),
    "distilbert": Block(
        activation="ffn.activation",
        activation_key="activation",
        masked=True,
        call=_distilbert_call,
        before=lambda layer, states: states,
        after=_distilbert_after,
        answer=lambda output, probabilities, wanted: (probabilities, output) if wanted else (output,),
    ),
    "vit": Block(
        activation="intermediate.intermediate_act_fn",
        activation_key="hidden_act",
        masked=False,
        call=lambda states, head_mask=None: Call(states=states, head_mask=head_mask),
        before=lambda layer, states: layer.layernorm_before(states),
        after=_vit_after,
        answer=lambda output, probabilities, wanted: output,
    ),
}
"""By name of the family."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a layer does in its model: see `edgekd.arch.Layer`; `place` is its index, `feeds` that the next one shares.

    Without any of them it computes as ever, on the tokens that earlier layers left.
    """

    place: int
    tokens: int
    shares: bool
    feeds: bool


@cache
def compact_class(base: type, family: str, places: Places) -> type:
    """A subclass of a layer's class that computes as its `role` says, with what `flow` brings it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, BLOCKS[family], places, BLOCKS[family].call(*args, **kwargs))

    return type(f"Compact{base.__name__}", (base,), {"forward": forward, "own_class": base})


def _forward(layer: Any, block: Block, places: Places, call: Call) -> Any:
    role: Role = layer.role
    flow: Flow = layer.flow
    if role.place == flow.first:
        flow.begin()
    mask, states = flow.masked(call.mask), call.states
    context, probabilities = _attend(layer, places, role, block.before(layer, states), mask, call)
    flow.probabilities = probabilities if role.feeds else None
    if role.tokens == 1:
        states = states[:, :1]
        flow.keep(role.place + 1, torch.zeros_like(states[:, :, 0], dtype=torch.long), mask)
    elif role.tokens and probabilities is not None:
        chosen = most_attended(probabilities, mask, role.tokens)
        rows = flat_rows(chosen, states)
        context, states = pick(context, rows), pick(states, rows)
        flow.keep(role.place + 1, chosen, mask)
    return block.answer(block.after(layer, context, states), probabilities, call.attentions)


def _attend(
    layer: Any, places: Places, role: Role, states: Tensor, mask: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """Context `[B, Q, heads * head_dim]`, and the probabilities `[B, heads, Q, S]` where somebody wants them."""
    attention = layer.get_submodule(places.attention)
    heads = int(getattr(attention, places.heads))
    query, key, value = (_part(attention, name) for name in places.qkv)
    mask = mask[:, None, None, :] != 0 if mask is not None and mask.dim() == 2 else mask
    if role.tokens == 1 and mask is not None:
        mask = mask[:, :, :1]
    values = _split(value, heads, states)
    dropout = _dropout(attention) if layer.training else 0.0
    explicit = role.shares or role.feeds or role.tokens > 1 or call.attentions or call.head_mask is not None
    asked = states[:, :1] if role.tokens == 1 else states
    # Traced, the one-piece operator would leave a dozen nodes that work out a constant.
    if not (explicit or tracing()):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        context = sdpa(_split(query, heads, asked), _split(key, heads, states), values, mask, dropout)
        return join_heads(context, value.out_features), None
    if role.shares:
        probabilities = layer.flow.probabilities
        if role.tokens == 1:
            probabilities = probabilities[:, :, :1]
    else:
        scale = math.sqrt(query.out_features // heads)
        probabilities = _probabilities(_split(query, heads, asked), _split(key, heads, states), mask, scale)
    used = torch.nn.functional.dropout(probabilities, dropout) if dropout else probabilities
    if call.head_mask is not None:
        used = used * call.head_mask
    return join_heads(used @ values, value.out_features), probabilities


def _part(attention: Any, name: str) -> Any:
    """A projection, or None where shared attention has none."""
    return getattr(attention, name, None)


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) / scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _split(module: Any, heads: int, states: Tensor) -> Tensor:
    """Project and split into heads: `[B, S, D]` -> `[B, heads, S, head_dim]`."""
    return split_heads(module(states), heads, module.out_features // heads)


def _dropout(attention: nn.Module) -> float:
    """The probability of dropping attention, which transformers keeps in one of two places."""
    own = getattr(attention, "dropout_prob", None)
    return float(getattr(getattr(attention, "dropout", None), "p", 0.0) if own is None else own)
