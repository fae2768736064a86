"""The residual stream of an encoder: its width, and cutting it.

Minitron (Muralidharan et al. 2024, arXiv 2407.14679): one set of channels is kept everywhere, so that embeddings, norms
and the inner dimensions of all matrices agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgekd.errors import ModelError
from edgekd.families.linear import Sliceable, columns, convolution, embedding, has, layer_norm, matrix, put, rows

if TYPE_CHECKING:
    from edgekd.families.encoder import Places

POOLER = "pooler.dense"
"""From the base model: where there is a pooler, classifiers read what it says and not the residual stream."""
HEADS = (
    ("classifier.dense",),
    ("pre_classifier",),
    ("cls_classifier", "distillation_classifier"),
    ("classifier",),
    ("qa_outputs",),
)
"""From the model: what reads the residual stream where there is no pooler; the first that is there counts."""


def hidden(model: Any, places: Places) -> int:
    """Width of the residual stream."""
    layer = model.base_model.get_submodule(places.layers)[0]
    return matrix(layer, places.up).in_features


def slice_hidden(model: Any, places: Places, keep: torch.Tensor) -> None:
    """Keep channels `keep [h]` of the residual stream, in place; the head's inner width and `config` stay.

    Raises:
        ModelError: edgekd does not know the modules of this model's head that read the stream.
    """
    base = model.base_model
    readers = _readers(model)
    for path in _stream(base, places):
        _keep_channels(base, path, keep)
    for layer in base.get_submodule(places.layers):
        for path in (*(f"{places.attention}.{part}" for part in places.qkv), places.up):
            if has(layer, path):
                put(layer, path, columns(matrix(layer, path), keep))
        for path in (places.attention_output, places.down, *places.norms):
            _keep_channels(layer, path, keep)
    for root, path in readers:
        put(root, path, columns(matrix(root, path), keep))


def _stream(base: nn.Module, places: Places) -> list[str]:
    if places.entrance and has(base, places.entrance):
        return [places.entrance]
    return [path for path in places.stream if has(base, path)]


def _readers(model: Any) -> list[tuple[nn.Module, str]]:
    if has(model.base_model, POOLER):
        return [(model.base_model, POOLER)]
    for paths in HEADS:
        if all(has(model, path) for path in paths):
            return [(model, path) for path in paths]
    raise ModelError(
        f"edgekd cannot narrow {type(model).__name__}: it does not know which modules of its head read the hidden "
        "state; leave the hidden size as it is"
    )


def _keep_channels(root: nn.Module, path: str, keep: torch.Tensor) -> None:
    """Keep channels of a module that writes or normalizes the stream, or of a parameter `[..., D]` that is added."""
    parent, _, name = path.rpartition(".")
    part: Any = getattr(root.get_submodule(parent), name)
    if isinstance(part, nn.Parameter):
        put(root, path, nn.Parameter(part.data[..., keep]))
    elif isinstance(part, nn.Embedding):
        put(root, path, embedding(part, keep))
    elif isinstance(part, nn.LayerNorm):
        put(root, path, layer_norm(part, keep))
    elif isinstance(part, nn.Conv2d):
        put(root, path, convolution(part, out=keep))
    elif isinstance(part, (nn.Linear, Sliceable)) or callable(getattr(part, "rows", None)):
        put(root, path, rows(part, keep))
    else:
        raise TypeError(f"{path} is a {type(part).__name__}, which cannot be narrowed")
