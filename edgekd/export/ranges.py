"""Ranges of activations: observed on data, or brought from training."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgekd.errors import RecipeError
from edgekd.export.onnx import quiet_export

Ranges = Mapping[str, tuple[float, float]]
Feeds = Mapping[str, np.ndarray]

LOWEST = float(np.finfo(np.float32).min)
MULTIPLIED = ("MatMul", "Gemm", "Conv")


def calibrate(
    source: Path, feeds: Sequence[Feeds], *, operators: Sequence[str] | None = MULTIPLIED
) -> dict[str, tuple[float, float]]:
    """Minimum and maximum of every tensor that a calibrated lowering quantizes, over the given inputs.

    Args:
        source: float32 ONNX file.
        feeds: arrays by input name.
        operators: types of operators whose inputs and outputs count, None for all; see `operators_to_calibrate`.

    Raises:
        RecipeError: no inputs, or a tensor without a finite range.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    if not feeds:
        raise RecipeError("static quantization needs calibration data, and there is none")
    with tempfile.TemporaryDirectory() as scratch, quiet_export():
        calibrator = create_calibrator(
            source,
            None if operators is None else list(operators),
            augmented_model_path=str(Path(scratch) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for feed in feeds:
            calibrator.collect_data(_Reader([feed]))
        data = calibrator.compute_data()
    ranges = {}
    for name, value in data.items():
        low, high = (float(np.asarray(x).reshape(-1)[0]) for x in value.range_value)
        if operators is None and low == -np.inf:
            low = LOWEST  # a mask's "never", which the lowering rewrites
        if not (np.isfinite(low) and np.isfinite(high)):
            raise RecipeError(
                f"calibration met a tensor without a finite range ({name}); check the data for bad values"
            )
        ranges[name] = (low, high)
    return ranges


class _Reader:
    """Calibration data as onnxruntime reads it: one feed at a time, then None."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._left = list(feeds)

    def get_next(self) -> Feeds | None:
        return self._left.pop(0) if self._left else None

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Feeds:
        feed = self.get_next()
        if feed is None:
            raise StopIteration
        return feed
