"""Builds the `Family` of a transformer encoder from the places where its modules are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekd.families.family import Family
from edgekd.families.linear import columns, rows, spread


@dataclass(frozen=True, kw_only=True)
class Places:
    """Dotted paths: `layers` and `patches` from the base model, the rest from one layer.

    `heads` and `width` are the attributes of `attention` that hold the number of heads and their total width.
    """

    layers: str
    attention: str
    qkv: tuple[str, str, str]
    attention_output: str
    up: str
    down: str
    heads: str = "num_attention_heads"
    width: str = "all_head_size"
    hidden: str = "hidden_size"
    depth: str = "num_hidden_layers"
    patches: str | None = None


def encoder(name: str, model_types: tuple[str, ...], places: Places) -> Family:
    """The `Family` of encoders whose layers are attention followed by a two-matrix feed-forward network."""

    def layers(model: Any) -> list[nn.Module]:
        return list(model.base_model.get_submodule(places.layers))

    def set_layers(model: Any, keep: list[int]) -> None:
        kept = nn.ModuleList([layers(model)[i] for i in keep])
        _replace(model.base_model, places.layers, kept)
        setattr(model.config, places.depth, len(keep))

    def heads(layer: nn.Module) -> int:
        return int(getattr(layer.get_submodule(places.attention), places.heads))

    def head_dim(model: Any) -> int:
        attention = layers(model)[0].get_submodule(places.attention)
        return int(getattr(attention, places.width) // getattr(attention, places.heads))

    def slice_heads(layer: nn.Module, keep: torch.Tensor, head_dim: int) -> None:
        features = spread(keep, head_dim)
        for path in qkv_paths:
            _replace(layer, path, rows(_linear(layer, path), features))
        _replace(layer, places.attention_output, columns(_linear(layer, places.attention_output), features))
        attention: Any = layer.get_submodule(places.attention)
        setattr(attention, places.heads, len(keep))
        setattr(attention, places.width, len(features))

    def slice_neurons(layer: nn.Module, keep: torch.Tensor) -> None:
        _replace(layer, places.up, rows(_linear(layer, places.up), keep))
        _replace(layer, places.down, columns(_linear(layer, places.down), keep))

    def qkv(layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        query, key, value = (layer.get_submodule(path) for path in qkv_paths)
        return query, key, value

    def embeddings(model: Any) -> nn.Module:
        module: nn.Module = (
            model.base_model.get_submodule(places.patches) if places.patches else model.get_input_embeddings()
        )
        return module

    qkv_paths = tuple(f"{places.attention}.{part}" for part in places.qkv)
    return Family(
        name=name,
        model_types=model_types,
        layers=layers,
        set_layers=set_layers,
        droppable=lambda model, index: True,
        heads=heads,
        neurons=lambda layer: _linear(layer, places.up).out_features,
        slice_heads=slice_heads,
        slice_neurons=slice_neurons,
        head_input=lambda layer: layer.get_submodule(places.attention_output),
        neuron_input=lambda layer: layer.get_submodule(places.down),
        qkv=qkv,
        embeddings=embeddings,
        hidden=lambda model: int(getattr(model.config, places.hidden)),
        head_dim=head_dim,
    )


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    module = layer.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{path} is a {type(module).__name__}, not a Linear")
    return module


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
