"""Rounding in training: what integers will do to a model, with gradients. Importing this does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.quantize.fake.scheme import Scheme

if TYPE_CHECKING:
    from edgekd.quantize.fake.installed import FakeQuantized

__all__ = ["Scheme", "install"]


def install(model: Any, scheme: Scheme, *, observer: str = "minmax", learned: bool = False) -> FakeQuantized:
    """See `edgekd.quantize.fake.installed.install`."""
    from edgekd.quantize.fake.installed import install as put

    return put(model, scheme, observer=observer, learned=learned)
