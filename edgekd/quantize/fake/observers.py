"""Which range of values to keep: the least and the largest seen, or one that cuts outliers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgekd.quantize.fake.grid import quantize_all

Find = Callable[..., tuple[Tensor, Tensor]]

PERCENTILE = 0.9999
BINS = 2048
STEPS = 40
LEAST = 0.3


def minmax(values: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """All of it."""
    return low, high


def percentile(values: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """What holds all but one of ten thousand values at each end."""
    ordered = values.sort().values
    last = len(ordered) - 1
    return ordered[math.floor((1 - PERCENTILE) * last)], ordered[math.ceil(PERCENTILE * last)]


def mse(values: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The range with the least squared error of rounding and cutting: both ends drawn in, then each alone."""

    def error(a: Tensor, b: Tensor) -> float:
        rounded = quantize_all(values, a, b, bits=bits, symmetric=symmetric)
        return float((rounded - values).square().mean())

    shares = torch.linspace(1.0, LEAST, STEPS).tolist()
    both = min(shares, key=lambda share: error(low * share, high * share))
    upper = min(shares, key=lambda share: error(low * both, high * share))
    lower = min(shares, key=lambda share: error(low * share, high * upper))
    return low * lower, high * upper


def entropy(values: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The range whose rounded values have a distribution nearest to that of the values, by KL divergence.

    Both ends are drawn in alike; with more than 8 bits there is nothing to gain by that. Migacz 2017, "8-bit Inference
    with TensorRT".
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    width = float(high - low)
    if width <= 0 or bits > 8:
        return low, high
    counts = torch.histc(values, BINS, float(low), float(high))
    centres = low + (torch.arange(BINS, device=values.device) + 0.5) * (width / BINS)
    levels = 2**bits - 1
    shares = torch.linspace(1.0, LEAST, STEPS).tolist()
    share = min(shares, key=lambda each: _divergence(counts, centres, low * each, high * each, levels))
    return low * share, high * share


def _divergence(counts: Tensor, centres: Tensor, low: Tensor, high: Tensor, levels: int) -> float:
    """KL of the counts, those outside moved to the ends, and of the same spread evenly over each level's bins."""
    inside = (centres >= low) & (centres <= high)
    if int(inside.sum()) < 2:
        return math.inf
    kept = counts[inside]
    moved = kept.clone()
    moved[0] += counts[centres < low].sum()
    moved[-1] += counts[centres > high].sum()
    level = ((centres[inside] - low) / (high - low) * levels).round().long().clamp(0, levels)
    filled = (kept > 0).to(kept.dtype)
    sums = torch.zeros(levels + 1, device=kept.device).index_add(0, level, kept)
    bins = torch.zeros(levels + 1, device=kept.device).index_add(0, level, filled)
    spread = (sums / bins.clamp_min(1))[level] * filled
    truth = moved / moved.sum()
    guess = (spread / spread.sum().clamp_min(1e-12)).clamp_min(1e-9)
    return float((truth * (truth.clamp_min(1e-12).log() - guess.log())).sum())


OBSERVERS: dict[str, Find] = {
    "minmax": minmax,
    "moving_average": minmax,  # of each batch, averaged over batches
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
"""`(values [N], least, largest, bits=, symmetric=)` to the ends of the range to keep."""
