"""What a forward pass shows of a model, for losses to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distill.attention_tap import tap
from edgekd.distill.job import Batch
from edgekd.families import family_of
from edgekd.families.compact import kept_tokens

AFTER_ATTENTION = {"bert": 0, "distilbert": 0, "vit": 1}
"""By family, which of a layer's two normalizations comes after attention and its residual."""


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
    By the number of their layer, from 1: `maps`, attention after the softmax `[B, heads, S, S]`, and `outputs`, what
    attention gives after residual and normalization, `[valid tokens, D]`, of the tokens of the hidden state of the
    same number. `features`, by the index of a hidden state, is that of an image `[B, C, H, W]` or `[B, patches, D]`.
    """

    logits: Tensor
    hidden: dict[int, Tensor]
    qkv: tuple[Tensor, ...] = ()
    kept: dict[int, Kept] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)


def observe(
    model: Any,
    batch: Batch,
    *,
    hidden: Sequence[int],
    qkv: Sequence[nn.Module] = (),
    maps: Sequence[int] = (),
    outputs: Sequence[int] = (),
    features: Sequence[int] = (),
) -> Signals:
    """Run the model; keep what is asked for, see `Signals`, and the outputs of the `qkv` modules."""
    with _captured(qkv) as caught, _captured(_norms(model, outputs)) as normed, _mapped(model, maps) as seen:
        output = model(**batch, output_hidden_states=True) if hidden or features else model(**batch)
    states, kept, found = {}, {}, {}
    for index in hidden:
        states[index], picked = _real_tokens(model, output.hidden_states[index], index, batch)
        if picked is not None:
            kept[index] = picked
    for place, number in enumerate(outputs):
        found[number], picked = _real_tokens(model, normed[place], number, batch)
        if picked is not None:
            kept[number] = picked
    return Signals(
        logits=output.logits,
        hidden=states,
        qkv=tuple(caught[i] for i in range(len(qkv))),
        kept=kept,
        maps=seen,
        outputs=found,
        features={index: _patches(model, output.hidden_states[index]) for index in features},
    )


def _real_tokens(model: Any, state: Tensor, index: int, batch: Batch) -> tuple[Tensor, Kept | None]:
    """Rows of a state's tokens without padding; which they are, if it has fewer than the input."""
    mask, positions = batch.get("attention_mask"), kept_tokens(model, index)
    if positions is None:
        return valid_tokens(state, mask), None
    real = torch.ones_like(positions) if mask is None else mask.gather(1, positions)
    return valid_tokens(state, real), _kept(positions, real.bool(), mask, tokens=_input_tokens(model, batch))


def _input_tokens(model: Any, batch: Batch) -> int:
    """Tokens of each sample, padding and special ones included."""
    first = next(iter(batch.values()))
    return int(first.shape[1] if first.dim() == 2 else model.base_model.embeddings.position_embeddings.shape[1])


def _patches(model: Any, state: Tensor) -> Tensor:
    """A state of an image without special tokens."""
    return state if state.dim() == 4 else state[:, -model.base_model.embeddings.patch_embeddings.num_patches :]


def _norms(model: Any, numbers: Sequence[int]) -> list[nn.Module]:
    """The normalization after attention, of layers counted from 1."""
    if not numbers:
        return []
    family = family_of(model.config.model_type)
    layers = family.layers(model)
    assert family.places is not None  # the wiring has refused other families
    path = family.places.norms[AFTER_ATTENTION[family.name]]
    return [layers[number - 1].get_submodule(path) for number in numbers]


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


@contextmanager
def _mapped(model: Any, numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the attention maps of layers, by their number from 1."""
    seen: dict[int, Tensor] = {}
    layers = family_of(model.config.model_type).layers(model) if numbers else []
    handles = [handle for number in numbers for handle in tap(layers[number - 1], _Maps(seen, number))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Maps:
    """Notes the map of one layer."""

    seen: dict[int, Tensor]
    number: int

    def operand(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def maps(self, probabilities: Tensor) -> None:
        self.seen[self.number] = probabilities
