"""Cheaper ways to compute an encoder's layers, put into a model of transformers in place.

Weights keep their names; what a shared attention does not need is removed, and a factorised matrix becomes two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edgekd.arch import Layer
from edgekd.errors import ModelError, unknown
from edgekd.families.compact_flow import Flow
from edgekd.families.compact_layers import BLOCKS, Block, Role, compact_class
from edgekd.families.compact_norm import affine_of
from edgekd.families.compact_rank import LowRank, factorise, pays, unfilled

if TYPE_CHECKING:
    from edgekd.families.encoder import Places
    from edgekd.families.family import Family

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu")
NORMS = ("affine",)


@dataclass(frozen=True, kw_only=True)
class Compact:
    """The operator fields of `edgekd.arch.Layer`, as they are kept on a layer of the model."""

    tokens: int = 0
    shares: bool = False
    rank: int = 0
    activation: str = ""
    norm: str = ""


def read(layer: nn.Module) -> dict[str, Any]:
    """The operator fields of a layer that differ from what its family does."""
    found = _state(layer)
    return {field.name: value for field in fields(found) if (value := getattr(found, field.name)) != field.default}


def kept_tokens(model: nn.Module, index: int) -> Tensor | None:
    """Positions `[B, k]` (int64, ascending, padding included) of the tokens of hidden state `index` of the last pass.

    None where all tokens of the input are there.
    """
    flow: Flow | None = getattr(model, "flow", None)
    return None if flow is None else flow.latest(index)


def install(model: nn.Module, family: Family, layers: Sequence[Layer], *, fresh: bool = False) -> None:
    """Bring the layers of a model to these operators, in place; what is as asked already is left alone.

    Args:
        model: a transformers model with its head.
        family: the family of the model.
        layers: one for each layer of the model; heads and neurons are not looked at.
        fresh: the weights will be loaded afterwards, so that factors need only have the right shapes.

    Raises:
        ModelError: the family or its head cannot compute so, or weights that are gone would be needed.
    """
    modules: list[Any] = family.layers(model)
    wanted = [Compact(**{field.name: getattr(layer, field.name) for field in fields(Compact)}) for layer in layers]
    if len(wanted) != len(modules):
        raise ModelError(f"operators for {len(wanted)} layers, but the model has {len(modules)}")
    if all(state == Compact() for state in (*wanted, *map(_state, modules))):
        return
    block, places = BLOCKS.get(family.name), family.places
    if block is None or places is None:
        raise ModelError(f"layers of family {family.name} have no other operators; known for {', '.join(BLOCKS)}")
    for problem in _problems(model, family, places, modules, wanted):
        raise ModelError(problem)
    for module, state in zip(modules, wanted, strict=True):
        _exchange(model, module, state, block, places, fresh)
    _route(model, family, block, places, modules, wanted)


def movable(model: nn.Module, family: Family) -> tuple[bool, bool]:
    """Whether layers of this model may drop tokens, and whether they may share attention."""
    if family.name not in BLOCKS or family.places is None:
        return False, False
    modules: list[Any] = family.layers(model)
    attentions = [module.get_submodule(family.places.attention) for module in modules]
    moved = not any(_is_tied_to_places(module, each) for module, each in zip(modules, attentions, strict=True))
    return moved and family.reads_first(model), moved


def _is_tied_to_places(module: Any, attention: Any) -> bool:
    relative = getattr(attention, "position_embedding_type", "absolute") != "absolute"
    return relative or bool(getattr(module, "is_decoder", False))


def _state(layer: Any) -> Compact:
    state: Compact = getattr(layer, "compact", Compact())
    return state


def _problems(
    model: Any, family: Family, places: Places, modules: Sequence[Any], wanted: Sequence[Compact]
) -> Iterator[str]:
    last, before = len(wanted) - 1, 0
    for i, (module, state) in enumerate(zip(modules, wanted, strict=True)):
        attention = module.get_submodule(places.attention)
        moved = state.tokens or state.shares
        if state.tokens and not family.reads_first(model):
            yield f"layer {i} cannot drop tokens: the head of {type(model).__name__} reads more than the first one"
        if state.tokens < 0 or (state.tokens == 1 and i != last):
            yield f"layer {i} cannot keep {state.tokens} tokens: one is for the last layer, others need at least 2"
        if before and state.tokens > before:
            yield f"layer {i} cannot keep {state.tokens} tokens: only {before} reach it"
        if moved and getattr(attention, "position_embedding_type", "absolute") != "absolute":
            yield f"layer {i} has relative positions: its attention cannot drop tokens or be shared"
        if moved and getattr(module, "is_decoder", False):
            yield f"layer {i} is a decoder's: its attention cannot drop tokens or be shared"
        if state.shares:
            yield from _sharing_problems(i, modules, wanted, family)
        elif getattr(attention, places.qkv[0], None) is None:
            yield f"layer {i} has no query and key of its own any more: it must share the attention of the layer before"
        if state.activation and state.activation not in ACTIVATIONS:
            yield unknown("activation", state.activation, ACTIVATIONS)
        if state.norm and state.norm not in NORMS:
            yield unknown("norm", state.norm, NORMS)
        if not state.norm and _state(module).norm:
            yield f"layer {i} has no LayerNorm any more, only a scale and shift"
        before = state.tokens or before


def _sharing_problems(i: int, modules: Sequence[Any], wanted: Sequence[Compact], family: Family) -> Iterator[str]:
    if i == 0:
        yield "layer 0 cannot share attention: there is no layer before it"
    elif family.heads(modules[i]) != family.heads(modules[i - 1]):
        yield (
            f"layer {i} has {family.heads(modules[i])} heads and the layer before {family.heads(modules[i - 1])}: "
            "they cannot share attention"
        )
    elif wanted[i - 1].tokens:
        yield f"layer {i} cannot share attention: the layer before drops tokens after its own"


def _exchange(model: Any, layer: Any, state: Compact, block: Block, places: Places, fresh: bool) -> None:
    """Put other modules where the operators of one layer ask for them."""
    have, attention = _state(layer), layer.get_submodule(places.attention)
    if state.activation != have.activation:
        from transformers.activations import ACT2FN

        name = state.activation or getattr(model.config, block.activation_key)
        _set(layer, block.activation, ACT2FN[name])
    if state.norm:
        for path, norm in list(layer.named_modules()):
            if isinstance(norm, nn.LayerNorm):
                _set(layer, path, affine_of(norm))
    if state.shares:
        for name in places.qkv[:2]:
            if hasattr(attention, name):
                delattr(attention, name)
    for path in matrices(places):
        parent, _, name = path.rpartition(".")
        linear = getattr(layer.get_submodule(parent), name, None)
        if linear is not None:
            _set(layer, path, _factored(linear, state.rank, fresh))
    if state == Compact():
        layer.__dict__.pop("compact", None)
    else:
        layer.compact = state


def matrices(places: Places) -> tuple[str, ...]:
    """Paths in a layer of all its matrices."""
    qkv = (f"{places.attention}.{part}" for part in places.qkv)
    return (*qkv, places.attention_output, places.up, places.down)


def _factored(linear: nn.Linear | LowRank, rank: int, fresh: bool) -> nn.Linear | LowRank:
    if not pays(linear, rank):
        return linear.dense() if isinstance(linear, LowRank) else linear
    if isinstance(linear, LowRank):
        if linear.rank == rank:
            return linear
        linear = linear.dense()
    return unfilled(linear, rank) if fresh else factorise(linear, rank)


def _route(
    model: Any, family: Family, block: Block, places: Places, modules: Sequence[Any], wanted: Sequence[Compact]
) -> None:
    """Give every layer the forward pass that its part in the model needs."""
    feeds = [state.shares for state in wanted[1:]] + [False]
    involved = [bool(state.tokens or state.shares or feed) for state, feed in zip(wanted, feeds, strict=True)]
    flow = Flow(involved.index(True)) if any(involved) else None
    base: type
    reduced = False
    for i, (layer, state) in enumerate(zip(modules, wanted, strict=True)):
        base = getattr(layer, "own_class", type(layer))
        # transformers leaves a bound forward behind when it has recorded hidden states; it would hide the class's own.
        layer.__dict__.pop("forward", None)
        layer.__dict__.pop("flow", None)
        layer.__dict__.pop("role", None)
        layer.__class__ = base
        if involved[i] or (reduced and block.masked):
            layer.role = Role(place=i, tokens=state.tokens, shares=state.shares, feeds=feeds[i])
            layer.flow = flow
            layer.__class__ = compact_class(base, family.name, places)
        reduced = reduced or state.tokens > 0
    model.__dict__.pop("flow", None)
    if flow is not None:
        model.flow = flow


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
