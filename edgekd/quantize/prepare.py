"""What a form is made from: the student with its weights made ready for the rounding of that form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError, TargetError
from edgekd.export.lower import precision_of
from edgekd.export.nbits import NEAREST, WEIGHT_ONLY, Grid, grid_of_form, grid_of_module, nearest
from edgekd.export.onnx import export_float
from edgekd.quantize import TABLE_BITS, Quantize, candidates
from edgekd.quantize.bias import Rounding, as_they_are, correct_biases
from edgekd.quantize.forms import needs_examples, trained_grid
from edgekd.quantize.linear import Inputs, copied, observe_inputs, rounded
from edgekd.quantize.rounding import round_adaptively
from edgekd.quantize.smooth import smooth
from edgekd.quantize.tuning import tune
from edgekd.quantize.weight_only import quantize_weights
from edgekd.student import Student
from edgekd.surgery.sample import sample_batches
from edgekd.target_fields import WEIGHTS_ALONE

if TYPE_CHECKING:
    from edgekd.context import Context

TRAINED = ("scheme", "observer", "learned", "activations", "attention")
"""What training under quantization leaves for any form."""


@dataclass(frozen=True)
class Source:
    """A student, with what its `quantization` must say for a form, and its float graph."""

    student: Student
    graph: Path


@dataclass
class Sources:
    """The sources of all forms; what several forms need is made once."""

    settings: Quantize
    student: Student
    """In float, as the stage got it."""
    trained: Student
    """After training under quantization, else the same."""
    graph: Path
    """Float graph of `student`."""
    ctx: Context
    float_metric: float
    made: dict[str, Source] = field(default_factory=dict)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """Calibration examples for fitting weights."""
        return sample_batches(self.ctx.train, self.settings.calibration, seed=self.ctx.seed + 2)

    @cached_property
    def smoothed(self) -> Student:
        """The student after scale migration."""
        if not self.settings.smooth:
            return self.trained
        student, count = smooth(self.trained, self.batches, self.settings.smooth)
        self.ctx.notes["smoothed"] = count
        return student

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        """What goes into the layers of the float model."""
        return observe_inputs(self.smoothed.model, self.batches)

    @cached_property
    def tuned(self) -> tuple[Student, dict[str, Any]]:
        """What neural-compressor chose."""
        return tune(self.smoothed, self.ctx, self.float_metric, self.settings.tolerance)

    def of(self, form: str) -> Source:
        """The source of a form."""
        kind = form if form in WEIGHT_ONLY else "float" if precision_of(form) in ("fp32", "fp16", "bf16") else "int8"
        if kind not in self.made:
            student = self.student if kind == "float" else self._prepared(form)
            graph = self.graph
            if student.model is not self.student.model:
                graph = export_float(student, self.ctx.task.name, self.ctx.work / f"{kind}-source.onnx")
            self.made[kind] = Source(student, graph)
        return self.made[kind]

    def _prepared(self, form: str) -> Student:
        kept = {
            key: value for key, value in (self.trained.quantization or {}).items() if key in (*TRAINED, "keep_float")
        }
        student, more = self._integers(form) if form in WEIGHT_ONLY else (self._eight_bits(), {})
        if self.settings.smooth and student.model is not self.trained.model:
            more = {**more, "smooth": self.settings.smooth}
        if student.model is not self.trained.model:
            more = {**more, "prepared": True}
        if self.settings.table_bits != TABLE_BITS:
            more = {**more, "table_bits": self.settings.table_bits}
        return replace(student, quantization={**kept, **more} or None)

    def _eight_bits(self) -> Student:
        """For forms with 8-bit weights and quantized activations."""
        student, adaptive = self.smoothed, self.settings.rounding == "adaptive"
        if adaptive:
            student = copied(student)
            self.ctx.notes["rounding_error"] = round_adaptively(student.model, self.inputs)
        return self._corrected(student, as_they_are if adaptive else _by_row)

    def _integers(self, form: str) -> tuple[Student, dict[str, Any]]:
        """For forms with quantized weights alone."""
        grid, _ = grid_of_form(form, self._asked(form))
        if self.settings.tune:
            student, weights = self.tuned
            return self._corrected(student, as_they_are), {"weights": weights}
        if self.settings.rounding == "adaptive":
            student, weights = quantize_weights(self.smoothed, grid, self.inputs)
            return self._corrected(student, as_they_are), {"weights": weights}
        weights = {**grid.to_dict(), "method": NEAREST}
        return self._corrected(self.smoothed, _on(grid)), {"weights": weights}

    def _asked(self, form: str) -> dict[str, Any]:
        """What settings, or training, say of the grid."""
        scheme = (self.trained.quantization or {}).get("scheme") or {}
        return trained_grid(scheme, form) or ({"group": self.settings.group} if self.settings.group else {})

    def _corrected(self, student: Student, rounding: Rounding) -> Student:
        if not self.settings.bias_correction:
            return student
        changed = copied(student)
        correct_biases(self.smoothed.model, changed.model, self.inputs, rounding)
        return changed


def _by_row(name: str, weight: Tensor) -> Tensor:
    return rounded(weight)


def _on(grid: Grid) -> Rounding:
    def rounding(name: str, weight: Tensor) -> Tensor:
        return torch.from_numpy(nearest(weight.detach().numpy(), grid_of_module(grid, name)).values())

    return rounding


def require_float(settings: Quantize, student: Student) -> Student:
    """The student as quantization may take it up; an earlier choice of a form is forgotten.

    Raises:
        ModelError: its weights were changed for one form, or it comes quantized from elsewhere.
    """
    own = student.quantization or {}
    if getattr(student.model.config, "quantization_config", None):
        raise ModelError(
            "the model was quantized elsewhere (config.json has a quantization_config): give the float one"
        )
    if own.get("prepared"):
        raise ModelError(
            f"the model is already quantized to {own.get('lowering')}, and its weights were changed for that: "
            "quantize the folder it was made from"
        )
    changes = settings.epochs or settings.smooth or settings.rounding != NEAREST or settings.bias_correction
    if own.get("scheme") and (changes or settings.tune):
        raise ModelError(
            "the model was trained under quantization already, and its weights are rounded: only its form can be "
            "chosen anew (epochs: 0, without smooth, rounding, bias_correction and tune); or begin with the float model"
        )
    kept = {key: value for key, value in own.items() if key in TRAINED}
    return replace(student, quantization=kept or None)


def say_what_is_not_fitted(settings: Quantize, student: Student, ctx: Context) -> None:
    """Tell of convolutions that settings for linear layers do not reach."""
    changes = {
        "smooth": settings.smooth,
        "rounding: adaptive": settings.rounding != NEAREST,
        "bias_correction": settings.bias_correction,
    }
    count = sum(isinstance(module, nn.Conv2d) for module in student.model.modules())
    if count and (asked := [name for name, on in changes.items() if on]):
        ctx.notes["not_fitted"] = count
        ctx.progress.say(
            f"quantize: {', '.join(asked)} changes linear layers alone: {count} convolutions stay as they are"
        )


def wanted_forms(settings: Quantize, ctx: Context) -> tuple[str, ...]:
    """The forms to build.

    Raises:
        TargetError: the target runs none that the settings allow.
    """
    forms = candidates(settings.lowering, ctx.target)
    small = settings.weight_bits == 4 or settings.tune or ctx.budget.size_mb is not None
    if settings.lowering == "auto" and small:
        forms += tuple(form for form in ctx.target.forms if form in WEIGHTS_ALONE)
    left = tuple(form for form in forms if _allowed(form, settings))
    if not left:
        more = "" if forms == () else ", with " + _limits(settings)
        raise TargetError(
            f"target {ctx.target.name} runs none of the forms of quantize.lowering: {settings.lowering}{more}; "
            f"choose auto or one of: {', '.join(ctx.target.forms)}"
        )
    return left


def _allowed(form: str, settings: Quantize) -> bool:
    """Whether bits and activations are as the settings say; 4-bit weights that were trained run as 8 bits too."""
    if precision_of(form) not in ("int8", "int4"):
        return True
    if settings.weight_bits == 4 and not settings.epochs and form != "int4_weights":
        return False
    if settings.activations is None or form in WEIGHT_ONLY:
        return True
    return needs_examples(form) == (settings.activations == "static")


def _limits(settings: Quantize) -> str:
    said = [f"weight_bits: {settings.weight_bits}"] if settings.weight_bits == 4 else []
    return " and ".join([*said, *([f"activations: {settings.activations}"] if settings.activations else [])])
