"""What a forward pass shows of a model, for losses to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distill.job import Batch
from edgekd.families.compact import kept_tokens


@dataclass(frozen=True)
class Kept:
    """Which tokens a hidden state with fewer of them still has, padding left out.

    `rows [n]` are their rows in a state `[valid tokens, D]` that has all; `counts [B]` how many each sample has.
    """

    rows: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a model shows of one batch.

    `logits [B, C]`; `hidden` states `[valid tokens, D]` by their index in `output_hidden_states`; `qkv`, the last
    layer's query, key and value, `[B, S, D]` each. `kept` tells of the hidden states that do not have all tokens which.
    """

    logits: Tensor
    hidden: dict[int, Tensor]
    qkv: tuple[Tensor, ...] = ()
    kept: dict[int, Kept] = field(default_factory=dict)


def observe(model: Any, batch: Batch, *, hidden: Sequence[int], qkv: Sequence[nn.Module] = ()) -> Signals:
    """Run the model; keep the hidden states with these indices, and the outputs of the `qkv` modules."""
    with _captured(qkv) as caught:
        output = model(**batch, output_hidden_states=True) if hidden else model(**batch)
    mask, states, kept = batch.get("attention_mask"), {}, {}
    for index in hidden:
        state, positions = output.hidden_states[index], kept_tokens(model, index)
        if positions is None:
            states[index] = valid_tokens(state, mask)
        else:
            real = torch.ones_like(positions) if mask is None else mask.gather(1, positions)
            states[index] = valid_tokens(state, real)
            kept[index] = _kept(positions, real.bool(), mask, tokens=output.hidden_states[0].shape[1])
    return Signals(logits=output.logits, hidden=states, qkv=tuple(caught[i] for i in range(len(qkv))), kept=kept)


def _kept(positions: Tensor, real: Tensor, mask: Tensor | None, *, tokens: int) -> Kept:
    """Rows of the kept tokens `positions [B, k]`, of which `real [B, k]` are no padding, out of `tokens` a sample."""
    full = positions.new_ones(len(positions), tokens) if mask is None else mask.long()
    rows = (full.flatten().cumsum(0) - 1).view_as(full).gather(1, positions)
    return Kept(rows[real], real.sum(-1))


def valid_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, S, D]`, or `[B, D, H, W]` of a convolutional net, to `[valid tokens, D]`, sample after sample."""
    if states.dim() == 4:
        states = states.flatten(2).transpose(1, 2)
    if mask is None or bool(mask.all()):
        return states.reshape(-1, states.shape[-1])
    return states[mask.bool()]


def valid_mask(batch: Batch, tokens: int) -> Tensor:
    """Which tokens count, bool `[B, S]`; images have no padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    first = next(iter(batch.values()))
    return torch.ones(len(first), tokens, dtype=torch.bool, device=first.device)


def token_counts(batch: Batch, rows: int) -> Tensor:
    """Valid tokens per sample, int64 `[B]`, of hidden states with `rows` rows in all."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(-1)
    samples = len(next(iter(batch.values())))
    return torch.full((samples,), rows // samples, device=next(iter(batch.values())).device)


def mean_tokens(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean over each sample's tokens: `[valid tokens, D]` and counts `[B]` -> `[B, D]` in fp32."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), counts)
    sums = torch.zeros(len(counts), rows.shape[-1], device=rows.device).index_add(0, owner, rows.float())
    return sums / counts[:, None]


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of modules, by their place in the sequence: models call them in orders of their own."""
    caught: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: caught.update({place: output})

    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
