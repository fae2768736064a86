"""Quantization to int8. Importing this package does not import torch or onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError, unknown

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student

__all__ = ["CHOICES", "Quantize"]

CHOICES = ("auto", "int8", "int8_dynamic", "int8_dynamic_fused", "int8_static")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Post-training int8: weights per channel, activations dynamic or with ranges calibrated on training data.

    `lowering` names one form, or lets `auto` and `int8` try all, evaluate each on the validation split and measure
    each on the target: the fastest whose metric is at most `tolerance` under the float student's is kept (`auto` may
    also keep float, where int8 is slower). Ranges are minima and maxima over `calibration` examples.
    """

    lowering: str = "auto"
    calibration: int = 128
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            RecipeError: unknown lowering or a value out of range.
        """
        if self.lowering not in CHOICES:
            raise RecipeError(unknown("lowering", self.lowering, CHOICES))
        if self.calibration < 1:
            raise RecipeError(f"calibration must be at least 1, not {self.calibration!r}")
        if not 0 <= self.tolerance < 1:
            raise RecipeError(f"tolerance must be between 0 and 1, not {self.tolerance!r}")

    @property
    def expected(self) -> str:
        """The form to expect while nothing is measured yet: what search predicts the latency of."""
        return "int8_dynamic_fused" if self.lowering in ("auto", "int8") else self.lowering

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with the chosen form (and its ranges) as `quantization`; the weights stay as they are."""
        from edgekd.quantize.ptq import quantize

        return quantize(self, student, ctx)
