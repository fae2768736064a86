"""How much of a tensor is noise, summed up over examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CEILING = 120.0
"""dB beyond which a difference is that of float32 rounding, and which equal tensors are said to have."""


def decibels(ratio: float) -> float:
    """Signal over noise in dB, of noise over signal; within ±`CEILING`, and the lowest for what is not a number."""
    if not np.isfinite(ratio):
        return -CEILING
    return float(np.clip(-10 * np.log10(max(ratio, 1e-30)), -CEILING, CEILING))


class Noise:
    """Energy of a tensor and of its error, whole and by channel.

    The channel is axis 1 of a tensor with four axes (channels of an image, heads of attention), else the last one.
    """

    def __init__(self) -> None:
        self.max_abs = 0.0
        self._signal: Array = np.zeros(0)
        self._noise: Array = np.zeros(0)

    @property
    def heard(self) -> bool:
        """Whether anything was compared."""
        return bool(len(self._signal))

    def add(self, signal: Array, noisy: Array, open_: Array) -> None:
        """Count one example of equal shapes; only where `open_` is true."""
        if not signal.size or not open_.any():
            return
        true = np.where(open_, signal, 0.0).astype(np.float64)
        error = np.where(open_, noisy.astype(np.float64) - true, 0.0)
        axis = 1 if signal.ndim == 4 else max(signal.ndim - 1, 0)
        others = tuple(other for other in range(signal.ndim) if other != axis)
        energies = [np.atleast_1d(np.square(values).sum(axis=others)) for values in (true, error)]
        if self.heard and len(energies[0]) != len(self._signal):
            # An axis that depends on the example has no channels.
            self._signal, self._noise = (np.atleast_1d(kept.sum()) for kept in (self._signal, self._noise))
            energies = [np.atleast_1d(values.sum()) for values in energies]
        self._signal = self._signal + energies[0] if self.heard else energies[0]
        self._noise = self._noise + energies[1] if len(self._noise) else energies[1]
        largest = float(np.abs(error).max())
        self.max_abs = largest if np.isnan(largest) else max(self.max_abs, largest)

    @property
    def ratio(self) -> float:
        """Noise over signal, the larger of the whole tensor's and the median channel's."""
        whole = _share(self._noise.sum(), self._signal.sum())
        each = [_share(noise, signal) for noise, signal in zip(self._noise, self._signal, strict=True) if signal > 0]
        return max(whole, float(np.median(each))) if each else whole

    @property
    def sqnr_db(self) -> float:
        """The same in dB, signal over noise."""
        return decibels(self.ratio)


def _share(noise: float, signal: float) -> float:
    if np.isnan(noise):
        return float("inf")
    return float(noise / signal) if signal > 0 else (0.0 if noise == 0 else float("inf"))
