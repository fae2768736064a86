"""Getting at what attention multiplies, whichever implementation a model computes it with.

transformers has one class or function for each implementation, most of which keep the attention maps to themselves, and
compact layers have their own. All of them come down to two products of four-dimensional tensors around a softmax, or to
the one operator that holds the three.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

OPERANDS = ("query", "key", "probabilities", "value")
"""What the two products multiply: query by transposed key, probabilities by value."""


class Watcher(Protocol):
    """What is told of attention; it may answer with other tensors."""

    def operand(self, name: str, tensor: Tensor) -> Tensor:
        """One of `OPERANDS`, `[B, heads, S, S or head_dim]`, the key `[B, heads, head_dim, S]`."""

    def maps(self, probabilities: Tensor) -> None:
        """The softmax `[B, heads, queries, S]`, before dropout."""


class _Tap(TorchFunctionMode):
    """Shows the attention of one layer to a watcher while the layer runs."""

    def __init__(self, watcher: Watcher, *, shares: bool) -> None:
        super().__init__()
        self.watcher, self.shares = watcher, shares
        self.products = 0

    def __enter__(self) -> _Tap:
        # A layer that shares attention has the second product alone.
        self.products = int(self.shares)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._attend(*args, **kwargs)
        if name in ("matmul", "__matmul__") and all(part.dim() == 4 for part in args[:2]):
            return self._product(*args)
        result = func(*args, **kwargs)
        if name == "softmax" and result.dim() == 4:
            self.watcher.maps(result)
        return result

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        names = OPERANDS[2:] if self.products else OPERANDS[:2]
        self.products += 1
        return self.watcher.operand(names[0], left) @ self.watcher.operand(names[1], right)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: Any,
    ) -> Tensor:
        """The operator in its parts, as its documentation gives them."""
        if is_causal or rest.get("enable_gqa"):
            raise NotImplementedError("causal or grouped attention is none of an encoder's")
        scores = self._product(query, key.transpose(-1, -2)) * (scale or 1 / math.sqrt(query.shape[-1]))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        probabilities = scores.softmax(-1)
        self.watcher.maps(probabilities)
        used = nn.functional.dropout(probabilities, dropout_p) if dropout_p else probabilities
        return self._product(used, value)


def tap(layer: nn.Module, watcher: Watcher) -> list[RemovableHandle]:
    """Show the attention of an encoder's layer to a watcher on every pass, until the handles are removed."""
    compact = getattr(layer, "compact", None)
    mode = _Tap(watcher, shares=bool(compact is not None and compact.shares))

    def enter(*_: Any) -> None:
        mode.__enter__()

    def leave(*_: Any) -> None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [
        layer.register_forward_pre_hook(enter),
        # Also after an error; last in, first out.
        layer.register_forward_hook(leave, always_call=True, prepend=True),
    ]
