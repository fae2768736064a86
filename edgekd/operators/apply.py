"""The operators one after the other, each with a guard of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgekd.errors import EdgekdError, StageError
from edgekd.families import compact
from edgekd.operators.guard import Verdict, build, not_measured, weigh
from edgekd.operators.shapes import EXACT, STEPS, inner_layers, sharing
from edgekd.operators.statistics import attention_similarity, calibrate_affine, refactorise
from edgekd.surgery.sample import sample_batches

if TYPE_CHECKING:
    from edgekd.arch import Arch
    from edgekd.context import Context
    from edgekd.operators import Operators
    from edgekd.student import Student

TOLERANCE = 1e-5
"""Largest difference of logits after an exact operator."""


def apply_operators(settings: Operators, student: Student, ctx: Context) -> Student:
    """See `Operators`; the student given is left as it is."""
    current, artifact = student, None
    ledger: list[dict[str, Any]] = []
    for name in STEPS:
        if not getattr(settings, name):
            continue
        facts: dict[str, Any] = {}
        try:
            candidate = with_operators(current, _wanted(name, settings, current, ctx, facts))
            if candidate.arch == current.arch:
                verdict = Verdict(kept=False, reason="dropped: there is nothing to change")
            else:
                if name in EXACT:
                    _require_same(name, current, candidate, ctx)
                artifact = artifact or _artifact(current, "without", settings, ctx)
                verdict, after = _judge(name, candidate, artifact, settings, ctx)
        except StageError:
            raise
        except EdgekdError as error:
            verdict = Verdict(kept=False, reason=f"dropped: {error}")
        if verdict.kept:
            _settle(name, candidate, current, settings, ctx)
            current, artifact = candidate, after
        ledger.append({"operator": name, **verdict.to_dict(), **facts})
        ctx.progress.say(f"operators: {name} {verdict.reason}")
    ctx.notes["operators"] = ledger
    ctx.notes["shape"] = current.arch.describe()
    return current


def with_operators(student: Student, arch: Arch) -> Student:
    """A copy of the student with the operators of a shape.

    Raises:
        ModelError: the model cannot have them.
    """
    model = copy.deepcopy(student.model)
    compact.install(model, student.family, arch.layers)
    return student.with_model(model)


def _wanted(name: str, settings: Operators, student: Student, ctx: Context, facts: dict[str, Any]) -> Arch:
    """The shape with one operator more."""
    arch = student.arch
    if name == "activation" and settings.activation == _own_activation(student):
        return arch
    if name == "share" and isinstance(settings.share, int):
        allowed = inner_layers(arch)
        if len(allowed) > settings.share:
            similar = attention_similarity(student, sample_batches(ctx.train, settings.samples, seed=ctx.seed))
            facts["similarity"] = similar
            allowed = sorted(sorted(allowed, key=lambda i: -similar[i - 1])[: settings.share])
        facts["layers"] = allowed
        return sharing(arch, allowed)
    return STEPS[name](settings, arch)


def _own_activation(student: Student) -> str | None:
    config = student.model.config
    return getattr(config, "hidden_act", None) or getattr(config, "activation", None)


def _artifact(student: Student, name: str, settings: Operators, ctx: Context) -> Path | None:
    if not_measured(ctx):
        return None
    return build(student, ctx, ctx.work / f"{name}.onnx")


def _judge(
    name: str, candidate: Student, before: Path | None, settings: Operators, ctx: Context
) -> tuple[Verdict, Path | None]:
    """Whether an operator stays, and the artifact with it."""
    if before is None:
        reason = not_measured(ctx)
        if name in EXACT:
            return Verdict(kept=True, reason=f"kept because it is exact, unmeasured: {reason}"), None
        decision = "kept because of force" if settings.force else "dropped: set force to keep it unmeasured"
        return Verdict(kept=settings.force, reason=f"{decision}; {reason}"), None
    after = build(candidate, ctx, ctx.work / f"with-{name}.onnx")
    return weigh(before, after, ctx, force=settings.force), after


def _require_same(name: str, before: Student, after: Student, ctx: Context) -> None:
    [batch, *_] = sample_batches(ctx.train, 16, seed=ctx.seed)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        first, second = (side.model.eval()(**inputs).logits for side in (before, after))
    difference = float((first - second).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(first.abs().max())):
        raise StageError(f"{name} should not change what the model says, but logits differ by {difference:.2g}")


def _settle(name: str, candidate: Student, before: Student, settings: Operators, ctx: Context) -> None:
    """Give an operator that stays the best weights that samples allow."""
    if name in ("norm", "rank"):
        batches = sample_batches(ctx.train, settings.samples, seed=ctx.seed)
        if name == "norm":
            calibrate_affine(candidate, batches)
        else:
            refactorise(candidate, before, batches)
