"""Training under fake quantization: the weights learn to live with the rounding that the device will do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgekd.distill.recover import evaluator, fit, require_same_words, without_labels
from edgekd.errors import DataError, RecipeError
from edgekd.quantize import candidates
from edgekd.quantize.fake.installed import FakeQuantized, install
from edgekd.quantize.fake.scheme import Scheme
from edgekd.quantize.forms import needs_examples
from edgekd.tasks import batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.quantize import Quantize
    from edgekd.student import Student
    from edgekd.target import Target

GROUP = 32
"""Inputs that share a scale with 4 bits where the form has groups, unless the settings say otherwise."""
TABLES = ("int8_dynamic", "int8_static", "int8_weights", "int4_weights")
"""How the names of forms begin that keep embeddings as integers."""


def train_quantized(settings: Quantize, student: Student, ctx: Context) -> Student:
    """Train a copy of the student under the rounding of `scheme_of`, and leave its weights rounded.

    The teacher is the run's or the float student. Ranges are calibrated first, follow the training data and stand from
    `freeze_ranges` of the steps on. The weights that score best on validation under fake quantization are kept, those
    before training among them. A run that was killed goes on where it was.

    With ternary weights and the losses of Kim et al. 2022, "Understanding and Improving Knowledge Distillation for
    Quantization-Aware Training of Large Transformer Encoders", arXiv:2211.11014, this is their method. ADAPT:
    activations are rounded as the runtime does it, not symmetrically with a clip that starts at 2.5; weights outside
    of the residual layers keep 8 bits. With feature affinity and without labels it is that of Li et al. 2023,
    arXiv:2302.10899. ADAPT: AdamW in place of SGD; biases and norms are trained too.

    Returns:
        The student with `quantization`: `scheme`, and for static ranges `activations`, by the name of the module that
        reads them, and those of `attention`, if it is under the scheme.

    Raises:
        RecipeError: a loss cannot be had for these two models, or training diverged.
        DataError: there are no examples to calibrate on, or they lead to values that are not finite.
        ModelError: `keep_float` names a module that is not there, or the teacher reads the texts as other tokens.
    """
    if settings.teacher == "teacher":
        require_same_words(student, ctx)
    scheme = scheme_of(settings, ctx.target)
    trained, quantized = put_on(settings, student, scheme, ctx)
    before = evaluator(trained.model, ctx, "fp32")()
    outcome = fit(
        settings,
        trained,
        ctx,
        teacher=None if settings.teacher == "teacher" else replace(student, model=copy.deepcopy(student.model)),
        modules={"quantizers": quantized},
        after_step=quantized.step,
        precision="fp32",
        change=lambda job: replace(job, before_step=partial(_stand, quantized, settings.freeze_ranges)),
    )
    if outcome.metric < before:
        trained, quantized = put_on(settings, student, scheme, ctx)
    ctx.notes["scheme"] = scheme.to_dict()
    ctx.notes["untrained_metric"] = before
    ctx.progress.say(
        f"trained under quantization: {ctx.task.metric} {outcome.metric:.4f} on validation after {outcome.steps} "
        f"steps, {before:.4f} before" + ("; weights stay as they were" if outcome.metric < before else "")
    )
    return _stripped(trained, quantized)


def quantize_only(settings: Quantize, student: Student, ctx: Context) -> Student:
    """What `train_quantized` returns with 0 epochs: a copy with calibrated ranges and rounded weights."""
    quantized_student, quantized = put_on(settings, student, scheme_of(settings, ctx.target), ctx)
    ctx.notes["untrained_metric"] = evaluator(quantized_student.model, ctx, "fp32")()
    return _stripped(quantized_student, quantized)


def scheme_of(settings: Quantize, target: Target) -> Scheme:
    """What the forms that these settings leave of a target will do to weights and activations.

    Dynamic ranges where a form has them, as ranges found later then fit any other form too; else static, or none where
    all forms keep activations float. Where steps are to be learned, static ones come first. Embeddings are rounded
    where a form does so. Weights of 4 bits have a scale for each channel, as forms that compute with 8-bit integers
    store them too, but groups where the form is made for them.

    Raises:
        RecipeError: steps are to be learned, and the scheme has none that could be.
    """
    forms = candidates(settings.lowering, target)
    static = [form for form in forms if needs_examples(form)]
    dynamic = any(form.startswith("int8_dynamic") for form in forms)
    free = "static" if static and (settings.learned or not dynamic) else "dynamic" if dynamic else "none"
    ranges = settings.activations or free
    if settings.learned and ranges != "static" and settings.weight_bits != 4:
        raise RecipeError(
            f"quantize: learned: true has nothing to learn on {target.name}: its ranges of activations are {ranges}, "
            "and only static ranges and the clips of 4-bit weights are learned; leave it out, or choose a form with "
            "static ranges"
        )
    return Scheme(
        weight_bits=settings.weight_bits,
        group=settings.group or (GROUP if settings.weight_bits == 4 and "int4_weights" in forms else 0),
        activations=ranges,
        activation_bits=16 if static == ["int16_qdq"] and ranges == "static" else 8,
        symmetric=target.symmetric and ranges == "static",
        attention=settings.attention,
        embeddings=settings.embeddings or any(form.startswith(TABLES) for form in forms),
        embedding_bits=settings.table_bits,
    )


def put_on(settings: Any, student: Student, scheme: Scheme, ctx: Context) -> tuple[Student, FakeQuantized]:
    """A copy of the student under fake quantization, calibrated on training examples."""
    copied = replace(student, model=copy.deepcopy(student.model).eval(), quantization=None)
    torch.manual_seed(ctx.seed)
    quantized = install(copied.model, scheme, observer=settings.observer, learned=settings.learned)
    quantized.calibrate(_examples(settings.calibration, ctx))
    return copied, quantized


def _examples(count: int, ctx: Context) -> Iterator[dict[str, torch.Tensor]]:
    """Training examples to calibrate on, the same that static forms without training take."""
    if not len(ctx.train):
        raise DataError("ranges need training examples to calibrate on, and there are none")
    indices = np.random.default_rng(ctx.seed + 2).permutation(len(ctx.train))[:count]
    data = ctx.train.take(indices)
    for chosen in batches(data, 32, shuffle=False):
        yield without_labels(data.collate(chosen))


def _stand(quantized: FakeQuantized, share: float, step: int, total: int) -> None:
    """Let ranges stand after this share of all steps."""
    quantized.freeze(round(share * total))


def _stripped(trained: Student, quantized: FakeQuantized) -> Student:
    quantized.freeze()
    kept: dict[str, Any] = {
        "scheme": quantized.scheme.to_dict(), "observer": quantized.observer, "learned": quantized.learned
    }  # fmt: skip
    for name, ranges in (("activations", quantized.ranges()), ("attention", quantized.attention_ranges())):
        if ranges:
            kept[name] = {place: list(ends) for place, ends in ranges.items()}
    if quantized.scheme.keep_float:
        kept["keep_float"] = list(quantized.scheme.keep_float)
    quantized.strip()
    return replace(trained, quantization=kept)
