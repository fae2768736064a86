"""Builds the `Family` of a transformer encoder from the places where its modules are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekd.families import width
from edgekd.families.family import Family
from edgekd.families.linear import columns, has, matrix, put, rows, spread


@dataclass(frozen=True, kw_only=True)
class Places:
    """Dotted paths: `layers`, `patches` and `stream` from the base model, the rest from one layer.

    `stream` holds the modules and parameters outside of the layers that write the residual stream or keep its shape;
    where there is an `entrance`, that projection alone writes it. `norms` are a layer's two. `heads` and `width` are
    the attributes of `attention` that hold the number of heads and their total width. `reads_first` are the classes
    whose head looks at the first token alone.
    """

    layers: str
    attention: str
    qkv: tuple[str, str, str]
    attention_output: str
    up: str
    down: str
    norms: tuple[str, str]
    stream: tuple[str, ...]
    entrance: str = ""
    reads_first: tuple[str, ...] = ()
    heads: str = "num_attention_heads"
    width: str = "all_head_size"
    depth: str = "num_hidden_layers"
    patches: str | None = None


def encoder(name: str, model_types: tuple[str, ...], places: Places) -> Family:
    """The `Family` of encoders whose layers are attention followed by a two-matrix feed-forward network."""

    def layers(model: Any) -> list[nn.Module]:
        return list(model.base_model.get_submodule(places.layers))

    def set_layers(model: Any, keep: list[int]) -> None:
        kept = nn.ModuleList([layers(model)[i] for i in keep])
        put(model.base_model, places.layers, kept)
        setattr(model.config, places.depth, len(keep))
        if getattr(model.config, "pruned_heads", None):
            # By indices of layers as they were; the widths are in the arch section.
            model.config.pruned_heads = {}

    def heads(layer: nn.Module) -> int:
        return int(getattr(layer.get_submodule(places.attention), places.heads))

    def head_dim(model: Any) -> int:
        attention = layers(model)[0].get_submodule(places.attention)
        return int(getattr(attention, places.width) // getattr(attention, places.heads))

    def slice_heads(layer: nn.Module, keep: torch.Tensor, head_dim: int) -> None:
        features = spread(keep, head_dim)
        for path in qkv_paths:
            if has(layer, path):
                put(layer, path, rows(matrix(layer, path), features))
        put(layer, places.attention_output, columns(matrix(layer, places.attention_output), features))
        attention: Any = layer.get_submodule(places.attention)
        setattr(attention, places.heads, len(keep))
        setattr(attention, places.width, len(features))

    def slice_neurons(layer: nn.Module, keep: torch.Tensor) -> None:
        put(layer, places.up, rows(matrix(layer, places.up), keep))
        put(layer, places.down, columns(matrix(layer, places.down), keep))

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
        neurons=lambda layer: matrix(layer, places.up).out_features,
        slice_heads=slice_heads,
        slice_neurons=slice_neurons,
        head_input=lambda layer: layer.get_submodule(places.attention_output),
        neuron_input=lambda layer: layer.get_submodule(places.down),
        qkv=qkv,
        embeddings=embeddings,
        hidden=lambda model: width.hidden(model, places),
        slice_hidden=lambda model, keep: width.slice_hidden(model, places, keep),
        norms=lambda layer: list(places.norms),
        reads_first=lambda model: type(model).__name__ in places.reads_first,
        head_dim=head_dim,
        places=places,
    )
