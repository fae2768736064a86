"""What goes into the matrices of a model on calibration examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.surgery.replay import Batch, features, without_labels


class _Passed(Exception):  # noqa: N818 - no error, but the way out of a forward pass
    """The layer that was asked for has run."""


@torch.no_grad()
def grams(
    model: nn.Module, found: Mapping[str, Any], batches: Sequence[Batch], until: nn.Module | None = None
) -> dict[str, Tensor]:
    """`X Xᵀ [F, F]` in float64 of the inputs of each module over all batches, padding left out.

    The model is run in `eval()` mode, no further than through the module `until`, and left in the mode it was in.
    """
    training, sums, device = model.training, _Sums(), next(model.parameters()).device
    model.eval()
    with ExitStack() as hooks:
        for name, module in found.items():
            hooks.callback(module.register_forward_pre_hook(sums.count(name)).remove)
        if until is not None:
            hooks.callback(until.register_forward_hook(_stop).remove)
        for batch in batches:
            mask = batch.get("attention_mask")
            sums.begin(None if mask is None else mask.to(device))
            try:
                model(**{key: value.to(device) for key, value in without_labels(batch).items()})
            except _Passed:
                continue
    model.train(training)
    return sums.grams


def _stop(*_: Any) -> None:
    raise _Passed


class _Sums:
    """Adds up products; modules that read the very same tensor, as query, key and value do, share the work."""

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self.latest: tuple[Tensor, Tensor] | None = None

    def begin(self, mask: Tensor | None) -> None:
        self.mask, self.latest = mask, None

    def count(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            product = self._product(module, inputs[0])
            self.grams[name] = self.grams[name] + product if name in self.grams else product

        return hook

    def _product(self, module: Any, values: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            # `unfold` puts the channels first; the matrix has them last.
            rows = features(module, values.float(), None)
            rows = rows.view(len(rows), module.in_channels, -1).transpose(1, 2).flatten(1)
            return (rows.T @ rows).double()
        if self.latest is None or self.latest[0] is not values:
            rows = features(module, values.float(), self.mask)
            self.latest = values, (rows.T @ rows).double()
        return self.latest[1]


def norms(gram: Tensor) -> Tensor:
    """‖x_j‖₂ `[F]` of every input over all tokens."""
    return gram.diagonal().clamp_min(0).sqrt()
