"""Ranges of activations from calibration data: by extremes, or by what quantization within a range would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.export.lower import LOWEST, calibrate

Array = npt.NDArray[Any]
Range = tuple[float, float]
Feeds = Mapping[str, Array]

BINS = 2048
LEVELS = 256
MOMENTUM = 0.9
"""Share of the old extremes that an example leaves in the moving average."""
PERCENTILE = 0.9999
"""Share of the values that is not cut off."""
SHARES = np.geomspace(1.0, 0.01, 60)
"""Parts of the seen extremes that are tried as limits."""


def find(graph: Path, feeds: Sequence[Feeds], observer: str, operators: Sequence[str] | None) -> dict[str, Range]:
    """Ranges of the float tensors of a graph over the given inputs.

    Args:
        graph: float32 ONNX file.
        feeds: arrays by input name, one example each.
        observer: a name of `OBSERVERS`, or `minmax`.
        operators: types of operators whose inputs and outputs count, None for all.

    Raises:
        DataError: an input has values that are not finite.
        ModelError: a tensor within the model has them.
        RecipeError: there are no inputs.
    """
    require_finite(feeds)
    try:
        extremes = calibrate(graph, feeds, operators=operators)
    except RecipeError:
        _require_numbers(graph, feeds)
        raise
    if observer == "minmax":
        return extremes
    seen = {name: Seen(low, high) for name, (low, high) in extremes.items()}
    for values in _runs(graph, feeds, list(seen)):
        for name, value in values.items():
            seen[name].add(value)
    limit = OBSERVERS[observer]
    return {name: each.range if each.is_plain else limit(each) for name, each in seen.items()}


def require_finite(feeds: Sequence[Feeds]) -> None:
    """Refuse inputs with NaN or infinity.

    Raises:
        DataError: names the tensor and the example.
    """
    for index, feed in enumerate(feeds):
        for name, value in feed.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise DataError(
                    f"calibration example {index} has values in {name} that are not finite (NaN or infinity): repair "
                    "the data, or leave the example out"
                )


def _runs(graph: Path, feeds: Sequence[Feeds], names: Sequence[str]) -> Iterator[dict[str, Array]]:
    """The values of named tensors, example by example."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(graph)
    own = {value.name for value in (*model.graph.output, *model.graph.input)}
    given = {value.name for value in model.graph.input}
    asked = [name for name in names if name not in given]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked if name not in own)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for feed in feeds:
        values = dict(zip(asked, session.run(asked, dict(feed)), strict=True))
        yield {**values, **{name: feed[name] for name in names if name in given}}


def _require_numbers(graph: Path, feeds: Sequence[Feeds]) -> None:
    """Refuse a model that computes NaN.

    Raises:
        ModelError: names the first tensor that has it.
    """
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    for values in _runs(graph, feeds, [name for node in nodes for name in node.output if name]):
        for name, value in values.items():
            if value.dtype.kind == "f" and np.isnan(value).any():
                raise ModelError(f"the model computes NaN in {name} on calibration data; look for a broken weight")


@dataclass
class Seen:
    """What was seen of one tensor: its extremes, their moving average, and a histogram between them."""

    low: float
    high: float
    average: Range | None = None
    counts: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))

    @property
    def range(self) -> Range:
        """The extremes."""
        return self.low, self.high

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to cut: a constant, or a mask's "never" among the values."""
        return self.low >= self.high or self.low <= LOWEST / 2

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The middle of every bin."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        return np.asarray((edges[1:] + edges[:-1]) / 2)

    def add(self, value: Array) -> None:
        """Count the values of one example."""
        if self.is_plain:
            return
        low, high = float(value.min()), float(value.max())
        if self.average is None:
            self.average = low, high
        before = self.average
        self.average = tuple(MOMENTUM * a + (1 - MOMENTUM) * b for a, b in zip(before, (low, high), strict=True))  # type: ignore[assignment]
        self.counts += np.histogram(value, bins=BINS, range=(self.low, self.high))[0]


def moving_average(seen: Seen) -> Range:
    """The moving average of the extremes of single examples."""
    return seen.average or seen.range


def percentile(seen: Seen) -> Range:
    """Cut off the same share of the values on both sides, `1 - PERCENTILE` together."""
    share = np.cumsum(seen.counts) / max(seen.counts.sum(), 1)
    tail = (1 - PERCENTILE) / 2
    low, high = int(np.searchsorted(share, tail)), int(np.searchsorted(share, 1 - tail))
    edges = np.linspace(seen.low, seen.high, BINS + 1)
    return float(edges[low]), float(edges[min(high + 1, BINS)])


def mse(seen: Seen) -> Range:
    """The limits with the least mean squared error of values rounded to 256 levels between them."""
    return _best(seen, _squared_error)


def entropy(seen: Seen) -> Range:
    """The limits whose 256 levels diverge least from the histogram (Migacz 2017), for both sides."""
    return _best(seen, _divergence)


OBSERVERS: dict[str, Callable[[Seen], Range]] = {
    "moving_average": moving_average,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
WEIGHING = ("mse", "entropy")
"""Those that look for the best limits of `LEVELS`."""


def _best(seen: Seen, cost: Callable[[Seen, float, float], float]) -> Range:
    """The part of both extremes together that costs least, then of each side alone, the upper first."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    share = min(SHARES, key=lambda share: cost(seen, low * share, high * share))
    low, high = low * share, high * share
    if high > 0:
        high = min((high * share for share in SHARES), key=lambda limit: cost(seen, low, limit))
    if low < 0:
        low = min((low * share for share in SHARES), key=lambda limit: cost(seen, limit, high))
    return float(low), float(high)


def _squared_error(seen: Seen, low: float, high: float) -> float:
    scale = (high - low) / (LEVELS - 1)
    zero = np.round(-low / scale)
    centres = seen.centres
    rounded = (np.clip(np.round(centres / scale) + zero, 0, LEVELS - 1) - zero) * scale
    return float((seen.counts * (centres - rounded) ** 2).sum())


def _divergence(seen: Seen, low: float, high: float) -> float:
    """KL of the histogram, what lies outside moved to the limits, from the same spread evenly over each level."""
    centres = seen.centres
    inside = (centres >= low) & (centres <= high)
    if inside.sum() < LEVELS // 2:
        return float("inf")  # fewer bins than levels are always alike
    kept = np.flatnonzero(inside)
    own = seen.counts[kept].copy()
    level = np.clip(((centres[kept] - low) / (high - low) * LEVELS).astype(int), 0, LEVELS - 1)
    filled = own > 0
    sums, spread = np.bincount(level, own, LEVELS), np.bincount(level, filled, LEVELS)
    other = np.where(filled, (sums / np.maximum(spread, 1))[level], 0.0)
    own[0] += seen.counts[: kept[0]].sum()
    own[-1] += seen.counts[kept[-1] + 1 :].sum()
    p, q = own / max(own.sum(), 1), other / max(other.sum(), 1)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-10))).sum())
