"""The description of one distillation loss: what the tables beside the functions hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["logits", "labels", "hidden", "embedding", "qkv", "mask", "states", "maps", "outputs", "features"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss: `function(student, teacher, ...)` returns a scalar in fp32.

    `needs` lists the inputs in the order the function takes them. The first is given for student and teacher,
    except that `labels` is the true class instead of the teacher's part; the others follow as keywords:

    - `logits`: `[N, C]` each
    - `hidden`: sequences of matched layers, `[valid tokens, D]` each, of equal width
    - `embedding`: `[B, K]` each, the mean of the last hidden state over valid tokens; widths may differ
    - `qkv`: `(query, key, value)` of the last layer, `[B, S, D]` each; widths may differ
    - `states`: as `hidden`, but raw, and with the output of the embeddings first where both have the same shape
    - `maps`: attention after the softmax, `[B, heads, S, S]` of matched layers, with equal heads
    - `outputs`: attention's output after residual and normalization, `[valid tokens, D]` of matched layers
    - `features`: image features of matched stages or layers, `[B, positions, channels]` each; channels may differ
    - `labels`: `[N]`, int64
    - `mask`: `[B, S]` bool, true for valid tokens

    With fewer than `classes` classes it is constant, and nothing can be learned from it.
    """

    name: str
    function: Callable[..., Tensor]
    needs: tuple[Need, ...] = ("logits",)
    classes: int = 2

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The settings a recipe may give, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def table(*losses: Loss) -> dict[str, Loss]:
    """Index losses by name."""
    return {loss.name: loss for loss in losses}
