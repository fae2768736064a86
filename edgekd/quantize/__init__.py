"""Quantization to the forms a target runs. Importing this package does not import torch or onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgekd.errors import RecipeError, unknown

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student
    from edgekd.target import Target

__all__ = ["CHOICES", "Quantize", "candidates"]

FORMS = (
    "int8_dynamic", "int8_dynamic_fused", "int8_static", "int8_qdq", "int16_qdq", "int8_tflite", "fp16",
)  # fmt: skip
CHOICES = ("auto", "int8", *FORMS)


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Post-training quantization: activations dynamic, or with ranges calibrated on training data.

    `lowering` names one form, or lets `auto` (all forms of the target) and `int8` (its int8 forms) try several,
    evaluate each on the validation split and measure each on the target: the fastest whose metric is at most
    `tolerance` under the float student's is kept (`auto` may also keep float, where int8 is slower). Where the target
    cannot be measured, it is the first in the target's own order whose metric is good enough. Ranges are minima and
    maxima over `calibration` examples.
    """

    buys: ClassVar[tuple[str, ...]] = ("latency", "size")

    lowering: str = "auto"
    calibration: int = 128
    tolerance: float = 0.005
    force: bool = False

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
        """The form to expect on a CPU while nothing is measured yet: what search predicts the latency of."""
        return "int8_dynamic_fused" if self.lowering in ("auto", "int8") else self.lowering

    def expected_on(self, target: Target) -> str:
        """The same on any target: the usual one on a CPU, else the first that the target names."""
        forms = candidates(self.lowering, target)
        return forms[0] if forms and self.expected not in forms else self.expected

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with the chosen form (and its ranges) as `quantization`; the weights stay as they are."""
        from edgekd.quantize.ptq import quantize

        return quantize(self, student, ctx)


def candidates(lowering: str, target: Target) -> tuple[str, ...]:
    """The forms of a target that a choice of `CHOICES` leaves, preferred first; empty if it runs none of them.

    Plain fp32 is left out where a fused one is there: the final build chooses between the two.
    """
    if lowering == "auto":
        return tuple(form for form in target.forms if form != "fp32" or "fp32_fused" not in target.forms)
    if lowering == "int8":
        return tuple(form for form in target.forms if form.startswith("int8"))
    return tuple(form for form in target.forms if form == lowering)
