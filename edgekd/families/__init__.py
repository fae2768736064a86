"""Architecture families: where the heads, neurons, layers and embeddings of a transformers model are."""

from __future__ import annotations

from typing import Any

from edgekd.arch import Arch, Layer
from edgekd.errors import ModelError
from edgekd.families import compact
from edgekd.families.bert import BERT
from edgekd.families.distilbert import DISTILBERT
from edgekd.families.family import Family
from edgekd.families.resnet import RESNET
from edgekd.families.vit import VIT

FAMILIES: dict[str, Family] = {family.name: family for family in (BERT, DISTILBERT, VIT, RESNET)}
_BY_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}

__all__ = ["FAMILIES", "Family", "arch_of", "family_of"]


def family_of(model_type: str) -> Family:
    """The family of a transformers `model_type`.

    Raises:
        ModelError: no family knows this type.
    """
    if model_type not in _BY_TYPE:
        raise ModelError(
            f"edgekd cannot compress models of type {model_type!r} yet; it knows {', '.join(sorted(_BY_TYPE))}"
        )
    return _BY_TYPE[model_type]


def arch_of(model: Any, sources: tuple[int, ...] | None = None) -> Arch:
    """Read the shapes of a model; `sources[i]` is the teacher's layer that layer `i` comes from (default: `i`)."""
    family = family_of(model.config.model_type)
    layers = family.layers(model)
    sources = sources or tuple(range(len(layers)))
    return Arch(
        family=family.name,
        hidden=family.hidden(model),
        head_dim=family.head_dim(model),
        vocabulary=_words(family.embeddings(model)),
        layers=tuple(
            Layer(source=source, heads=family.heads(layer), neurons=family.neurons(layer), **compact.read(layer))
            for source, layer in zip(sources, layers, strict=True)
        ),
        channels=family.channels(model),
    )


def _words(embeddings: Any) -> int:
    """Rows of a word table; 0 for what looks at pixels."""
    return int(getattr(embeddings, "num_embeddings", 0))
