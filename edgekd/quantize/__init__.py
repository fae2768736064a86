"""Quantization to the forms a target runs. Importing this package does not import torch or onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from edgekd.distill.settings import Taught
from edgekd.errors import RecipeError, unknown
from edgekd.target_fields import RUNTIMES, WEIGHTS_ALONE

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student
    from edgekd.target import Target

__all__ = ["CHOICES", "Quantize", "candidates"]

FORMS = tuple(
    dict.fromkeys(
        name for runtime in RUNTIMES.values() for name in runtime.lowerings if not name.startswith(("fp32", "bf16"))
    )
)
CHOICES = ("auto", "int8", *FORMS)
TABLE_BITS: Literal[8] = 8
LEAST_GROUP = 16
"""The smallest group of inputs with a scale of its own that MatMulNBits knows."""


@dataclass(frozen=True, kw_only=True)
class Quantize(Taught):
    """Quantize a student: after training (`epochs: 0`), or with training under the rounding that will be there.

    `lowering` names one form, or lets `auto` (all forms of the target) and `int8` (its int8 forms) try several,
    evaluate each on the validation split and measure each on the target: the fastest whose metric is at most
    `tolerance` under the float student's is kept (`auto` may also keep float, where int8 is slower). Where the target
    cannot be measured, it is the first in the target's own order whose metric is good enough.

    Static ranges come from `calibration` examples by `observer`. A form that misses the tolerance gets `fallback`: the
    layers that hurt most (by the KL divergence that each alone costs) stay float until it is met. `smooth` (the alpha
    of SmoothQuant; 0: off), `rounding: adaptive` (AdaRound) and `bias_correction` change linear layers beforehand,
    without labels. `tune` lets neural-compressor choose bits and groups of the weights by the metric.

    `weight_bits` 4 keeps the weights in groups of `group` inputs with one scale each (0: 32 of them; with 8 bits the
    whole row); 2 is ternary, which needs training. Tables of embeddings have 8 `table_bits` and a scale for each row,
    or 4 and one for every 32 values. `activations` limits the forms to those with `static` or `dynamic` ranges; unset:
    what the form needs. `attention` and `embeddings` put the attention products and the word table under the same
    rounding.

    With `epochs`, `teacher` says who teaches: the run's `teacher`, or the float `student` itself. `freeze_ranges` is
    the share of the steps after which ranges stand still, `learned` learns the step sizes (LSQ): static ranges, which
    go first then, and the clips of 4-bit weights. The others mean what they mean in `Distill`.
    """

    buys: ClassVar[tuple[str, ...]] = ("latency", "size")

    lowering: str = "auto"
    calibration: int = 128
    tolerance: float = 0.005
    observer: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "minmax"
    fallback: bool = True
    bias_correction: bool = False
    smooth: Annotated[float, Ge(0), Lt(1)] = 0.0
    rounding: Literal["nearest", "adaptive"] = "nearest"
    tune: bool = False
    weight_bits: Literal[8, 4, 2] = 8
    group: int = 0
    table_bits: Literal[8, 4] = TABLE_BITS
    activations: Literal["dynamic", "static"] | None = None
    attention: bool = False
    embeddings: bool = False
    epochs: Annotated[int, Ge(0)] = 0
    learning_rate: Annotated[float, Gt(0)] = 5e-5
    teacher: Literal["teacher", "student"] = "teacher"
    freeze_ranges: Annotated[float, Ge(0), Le(1)] = 0.5
    learned: bool = False
    dropout: Annotated[float, Ge(0), Lt(1)] | None = 0.0

    def _problems(self) -> Iterator[str]:
        if self.lowering not in CHOICES:
            yield unknown("lowering", self.lowering, CHOICES)
        if self.calibration < 1:
            yield f"calibration must be at least 1, not {self.calibration!r}"
        if not 0 <= self.tolerance < 1:
            yield f"tolerance must be between 0 and 1, not {self.tolerance!r}"
        if self.group and (self.group < LEAST_GROUP or self.group & (self.group - 1)):
            yield f"group must be 0 or a power of two of at least {LEAST_GROUP}, not {self.group!r}"

    def require_together(self) -> None:
        """Check settings that depend on each other; a recipe's reader looks at each alone.

        Raises:
            RecipeError: names all that do not go together.
        """
        if wrong := list(self._contradictions()):
            raise RecipeError("quantize: " + "; ".join(wrong))

    def _contradictions(self) -> Iterator[str]:
        if self.weight_bits == 2 and not self.epochs:
            yield "weight_bits: 2 (ternary) is useless without training; set epochs, or weight_bits: 4"
        if self.weight_bits == 2 and self.group:
            yield f"weight_bits: 2 (ternary) has one scale for a matrix; leave out group: {self.group}"
        if self.learned and not self.epochs:
            yield "learned: true learns step sizes in training; set epochs, or leave it out"
        changes = {"smooth": self.smooth, "rounding: adaptive": self.rounding != "nearest", "tune": self.tune}
        if self.epochs and (named := [name for name, on in changes.items() if on]):
            yield f"{', '.join(named)} would undo what training has learned; leave out that or epochs"
        if self.tune and self.rounding != "nearest":
            yield "tune and rounding: adaptive both choose how weights are rounded; leave one out"

    @property
    def learns_few_bits(self) -> bool:
        """Whether weights are trained for fewer than 8 bits: then no layer is taken back to float afterwards."""
        return self.epochs > 0 and self.weight_bits < 8

    @property
    def expected(self) -> str:
        """The form to expect on a CPU while nothing is measured yet: what search predicts the latency of."""
        return "int8_dynamic_lean" if self.lowering in ("auto", "int8") else self.lowering

    def expected_on(self, target: Target) -> str:
        """The same on any target: the usual one on a CPU, else the first that the target names."""
        forms = candidates(self.lowering, target)
        return forms[0] if forms and self.expected not in forms else self.expected

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with the chosen form (and its ranges) as `quantization`.

        The weights stay as they are unless a setting (training, `smooth`, `rounding`, …) changes them.
        """
        from edgekd.quantize.ptq import quantize

        self.require_together()
        return quantize(self, student, ctx)


def candidates(lowering: str, target: Target) -> tuple[str, ...]:
    """The forms of a target that a choice of `CHOICES` leaves, preferred first; empty if it runs none of them.

    Plain fp32 is left out where a fused one is there: the final build chooses between the two. Forms with quantized
    weights alone are made where they are named, or where a recipe limits the size.
    """
    fused = "fp32_fused" in target.forms
    forms = [form for form in target.forms if not (form == "fp32" and fused)]
    if lowering not in ("auto", "int8"):
        return tuple(form for form in target.forms if form == lowering)
    computed = [form for form in forms if form not in WEIGHTS_ALONE]
    return tuple(form for form in computed if lowering == "auto" or form.startswith("int8"))
