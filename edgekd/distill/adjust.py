"""Temporary changes to a model for the time it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

# Attention modules of transformers hold a probability of their own beside their Dropout modules.
_ATTENTION_DROPOUT = ("dropout_prob", "attention_dropout")


@contextmanager
def dropout(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Train with this dropout everywhere; None leaves the model's own."""
    if probability is None:
        yield
        return
    places = [
        (module, name)
        for module in model.modules()
        for name in (("p",) if isinstance(module, nn.Dropout) else _ATTENTION_DROPOUT)
        if isinstance(getattr(module, name, None), int | float)
    ]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, probability)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave the parameters of these modules as they are."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
