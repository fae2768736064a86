"""Rounding of one activation: with the range of each example, or with one that was observed or is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgekd.errors import DataError
from edgekd.quantize.fake.grid import quantize_all, quantize_each, quantize_learned
from edgekd.quantize.fake.observers import OBSERVERS
from edgekd.quantize.fake.scheme import Scheme

SAMPLE = 16384
"""Values of a batch that an observer looks at, besides the least and the largest."""
PULL = 0.05
"""How far the range of a training batch pulls a range that does not stand yet."""
CALIBRATION_PULL = 0.3
"""The same for the few batches of calibration."""
PACE = 20.0
"""How much faster than a weight a learned range moves, relative to itself."""
MOVING = ("minmax", "moving_average", "percentile")
"""Observers that go on in training; the others search, which would take longer than a step."""


class Activation(nn.Module):
    """Rounds what it is called with, as the scheme says."""

    low: Tensor
    high: Tensor

    def __init__(self, scheme: Scheme, *, observer: str, learned: bool) -> None:
        super().__init__()
        self.bits, self.symmetric = scheme.activation_bits, scheme.symmetric
        self.observer = observer
        self.dynamic = scheme.activations == "dynamic"
        self.observing = self.frozen = False
        self._values: list[Tensor] = []
        if not self.dynamic:
            self.register_buffer("low", torch.tensor(torch.nan))
            self.register_buffer("high", torch.tensor(torch.nan))
        self.change = nn.Parameter(torch.zeros(2)) if learned and not self.dynamic else None

    def forward(self, inputs: Tensor, real: Tensor | None = None) -> Tensor:
        """`[B, …]` -> the same in fp32, rounded; `real`, broadcastable to it, is False where there is padding."""
        inputs = inputs.float()
        if self.observing:
            self._look(inputs, real)
            return inputs
        if self.dynamic:
            return quantize_each(inputs, *_ends(inputs, real), bits=self.bits, symmetric=self.symmetric)
        if self.training and not self.frozen and self.change is None:
            self._follow(inputs, real)
        if self.change is not None and not self.frozen:
            return quantize_learned(inputs, *self._range(), bits=self.bits, symmetric=self.symmetric)
        return quantize_all(inputs, *self.range(), bits=self.bits, symmetric=self.symmetric)

    def range(self) -> tuple[Tensor, Tensor]:
        """The ends of the range: scalars without gradient."""
        low, high = self._range()
        return low.detach(), high.detach()

    def _range(self) -> tuple[Tensor, Tensor]:
        if self.change is None:
            return self.low, self.high
        factors = (1.0 + PACE * self.change).clamp_min(0.05)
        return self.low * factors[0], self.high * factors[1]

    @torch.no_grad()
    def _look(self, inputs: Tensor, real: Tensor | None) -> None:
        """Note the ends of a calibration batch, and some of its values."""
        low, high = (end.amin() if i == 0 else end.amax() for i, end in enumerate(_ends(inputs, real)))
        if not (low.isfinite() and high.isfinite()):
            raise DataError("calibration met values that are not finite; look at the examples and at the weights")
        if self.low.isnan():
            self.low.copy_(low)
            self.high.copy_(high)
        elif self.observer == "moving_average":
            self._set(low, high, CALIBRATION_PULL)
        else:
            self._set(torch.minimum(self.low, low), torch.maximum(self.high, high))
        if OBSERVERS[self.observer] is not OBSERVERS["minmax"]:
            self._values.append(_sample(inputs, real))

    @torch.no_grad()
    def settle(self) -> None:
        """Choose the range from all that was noted."""
        if self._values:
            self._set(*self._find(torch.cat(self._values), self.low, self.high))
        self._values = []

    def _find(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return OBSERVERS[self.observer](values, low, high, bits=self.bits, symmetric=self.symmetric)

    def _set(self, low: Tensor, high: Tensor, pull: float = 1.0) -> None:
        self.low.lerp_(low, pull)
        self.high.lerp_(high, pull)

    @torch.no_grad()
    def _follow(self, inputs: Tensor, real: Tensor | None) -> None:
        """Move the range towards that of a training batch."""
        if self.observer not in MOVING:
            return
        if self.observer == "percentile":
            values = _sample(inputs, real)
            ends = self._find(values, values.amin(), values.amax())
        else:
            lows, highs = _ends(inputs, real)
            ends = lows.amin(), highs.amax()
        if ends[0].isfinite() and ends[1].isfinite():
            self._set(*ends, pull=PULL)


def _ends(inputs: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and largest real value of each example `[B]`, or 0 where that is beyond: ranges hold 0 anyway."""
    values = inputs.detach()
    if real is not None:
        values = values * real
    low, high = values.flatten(1).aminmax(dim=1)
    return low.clamp(max=0.0), high.clamp(min=0.0)


def _sample(inputs: Tensor, real: Tensor | None) -> Tensor:
    """About `SAMPLE` of the real values, evenly spaced, with a step that does not miss channels."""
    values = inputs if real is None else inputs[real.expand_as(inputs)]
    step = max(values.numel() // SAMPLE, 1)
    while math.gcd(step, inputs[0].numel()) > 1:
        step += 1
    return values.flatten()[::step].clone()
