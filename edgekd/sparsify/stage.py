"""The sparsify stage: choose zeros, train what stays, remember what was promised."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from edgekd.context import Silent
from edgekd.distill.processes import this_process
from edgekd.distill.recover import evaluator, require_same_words
from edgekd.errors import RecipeError
from edgekd.export.nbits import NEAREST
from edgekd.families.zeros import promise
from edgekd.quantize.forms import EXAMPLES
from edgekd.sparsify.boost import install
from edgekd.sparsify.masked import Masks
from edgekd.sparsify.matrices import matrices
from edgekd.sparsify.patterns import Pattern, other_share, remark, resolve
from edgekd.sparsify.plan import make_plan
from edgekd.sparsify.rounding import Rounding, under_rounding
from edgekd.sparsify.train import Course, train_sparse
from edgekd.surgery.replay import without_labels
from edgekd.surgery.sample import sample_batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.sparsify import Sparsify
    from edgekd.student import Student


def sparsify(settings: Sparsify, student: Student, ctx: Context) -> Student:
    """Make a copy of the student sparse; see `Sparsify.run`."""
    processes = this_process()
    ctx = ctx if processes.main else replace(ctx, progress=Silent())
    torch.manual_seed(ctx.seed)
    pattern = resolve(settings.pattern, ctx.target)
    if wrong := other_share(settings.pattern, settings.sparsity, ctx.target):
        raise RecipeError(f"sparsify: {wrong}")
    if said := remark(settings.pattern, ctx.target):
        ctx.progress.say(f"sparsify: {said}")
    settings = _comparable(settings, student, ctx)
    ctx = replace(ctx, teacher=_teacher(settings, student, ctx))
    own = replace(student, model=copy.deepcopy(student.model).eval())
    batches = [without_labels(each) for each in sample_batches(ctx.train, settings.calibration, seed=ctx.seed)]
    found = matrices(own, pattern, settings.dense)
    if settings.boost:
        install(own.model, found, settings.boost)
    plan = make_plan(settings, own, pattern, batches)
    masks, score = Masks.install(plan.modules), evaluator(own.model, ctx, "fp32")
    rounding = under_rounding(own, batches)
    notes: dict[str, Any] = {"pattern": pattern.name, "dense_metric": score()}
    if settings.masks == "fixed" or not settings.epochs:
        plan.cut(masks, 1.0)
        notes["one_shot_metric"] = score()
    if settings.epochs:
        train_sparse(Course(settings=settings, plan=plan, masks=masks, rounding=rounding), own, ctx)
    notes["metric"] = score()
    quantization = _finished(own, masks, rounding, ctx)
    weights = {name: module.weight for name, module in plan.modules.items()}
    section = promise(pattern.name, weights, storage=settings.storage)
    ctx.notes["sparsity"] = {**notes, **_told(section, weights)}
    ctx.progress.say(_line(ctx, pattern, notes, masks.sparsity))
    return replace(own, sparsity=section, quantization=quantization)


def _finished(student: Student, masks: Masks, rounding: Rounding | None, ctx: Context) -> dict[str, Any] | None:
    """Leave plain modules with exact zeros; what the student then remembers of its quantization."""
    quantization = None if student.quantization is None else dict(student.quantization)
    if rounding is not None and quantization is not None:
        quantization |= rounding.strip()
    masks.finish()
    if quantization is not None and "ranges" in quantization:
        # Those were calibrated with the weights as they were; export finds them again.
        del quantization["ranges"]
        quantization = {"calibration": EXAMPLES, "seed": ctx.seed, **quantization}
    weights = (quantization or {}).get("weights") or {}
    if weights.get("method", NEAREST) != NEAREST:
        ctx.progress.say(f"sparsify: changed weights that {weights['method']} had rounded; export rounds to nearest")
        quantization = {**(quantization or {}), "weights": {**weights, "method": NEAREST}}
    return quantization


def _teacher(settings: Sparsify, student: Student, ctx: Context) -> Student:
    """The dense model that teaches.

    Raises:
        ModelError: it reads the texts as other tokens.
    """
    if settings.teacher == "student":
        return replace(student, model=copy.deepcopy(student.model).eval())
    require_same_words(student, ctx)
    return ctx.teacher


def _comparable(settings: Sparsify, student: Student, ctx: Context) -> Sparsify:
    """The settings without SquareHead where no states can be compared, unless the recipe says what to train on.

    Where the first layer already drops tokens, the dense student keeps other ones than the sparse one.
    """
    usual = settings.losses == type(settings)().losses
    if not (usual and settings.teacher == "student" and student.arch.layers[0].tokens):
        return settings
    ctx.progress.say("sparsify: both drop tokens from the first layer on, so states are not compared: no squarehead")
    return replace(settings, losses={name: term for name, term in settings.losses.items() if name != "squarehead"})


def _told(section: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger says of the zeros: their share in all matrices together and in each."""
    zeros: Mapping[str, int] = section["layers"]
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return {
        "sparsity": sum(zeros.values()) / sum(sizes.values()),
        "weights": sum(sizes.values()),
        "layers": {name: round(count / sizes[name], 4) for name, count in zeros.items()},
    }


def _line(ctx: Context, pattern: Pattern, notes: Mapping[str, Any], sparsity: float) -> str:
    words = {"dense_metric": "dense", "one_shot_metric": "cut", "metric": "sparse"}
    steps = [f"{word} {notes[key]:.4f}" for key, word in words.items() if key in notes]
    return f"sparsified: {sparsity:.1%} zeros, {pattern.name}; {ctx.task.metric} on validation: {', '.join(steps)}"
