"""What a target asks of a recipe: its forms, shapes, limits and default budget. Checked before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgekd import host
from edgekd.context import Budget
from edgekd.devices import is_estimated, unavailable
from edgekd.draft import Draft, dotted
from edgekd.errors import RecipeError, TargetError
from edgekd.quantize import CHOICES, Quantize, candidates
from edgekd.schema import At, Mistake
from edgekd.sparsify import Sparsify
from edgekd.sparsify.patterns import other_share, remark
from edgekd.target import Target, load_target, probe
from edgekd.target_fields import form_precision

LIMITS = ("latency_p95_ms", "speedup", "size_mb")
"""One of these must be in a budget; a target's own stand only where the recipe gives none."""


def fill_budget(draft: Draft) -> None:
    """Put the targets' default budgets where the recipe says nothing; defaults that differ are a mistake."""
    targets = list(_loaded(draft.get(("targets",)) or ["local"], []))
    asked = draft.get(("budget",))
    if not targets or not (asked is None or isinstance(asked, Mapping)):
        return
    given = {key for key, value in (asked or {}).items() if value is not None}
    for key, plain in (("batch", Budget.batch), ("sequence", Budget.sequence), *((name, None) for name in LIMITS)):
        if key in given or (key in LIMITS and given & set(LIMITS)):
            continue
        defaults = {target.name: target.budget.get(key, plain) for target in targets}
        if len(set(defaults.values())) > 1:
            said = ", ".join(f"{name}: {value}" for name, value in defaults.items())
            draft.report(Mistake(("budget",), f"the targets' own {key} differ ({said}): give {key}"))
        elif any(key in target.budget for target in targets):
            draft.put(("budget", key), next(iter(defaults.values())), f"target {targets[0].name}")


def budget_of(target: Target, asked: Mapping[str, Any]) -> Budget:
    """The budget of a command: what is asked, else the target's own, else edgekd's defaults."""
    given = {key: value for key, value in asked.items() if value is not None}
    own = {key: value for key, value in target.budget.items() if key not in LIMITS or not given.keys() & set(LIMITS)}
    return Budget(**{**own, **given})


def constraint_mistakes(budget: Budget, stages: Mapping[str, Any], targets: Sequence[str]) -> list[Mistake]:
    """Everything in a recipe that one of its targets cannot do, with its place in the recipe."""
    mistakes: list[Mistake] = []
    for target in _loaded(targets, mistakes):
        mistakes += _of_target(probe(target), budget, stages)
    return mistakes


def require(target: Target, budget: Budget, stages: Mapping[str, Any]) -> None:
    """The same for a command that runs single stages on one target.

    Raises:
        RecipeError: all that the target cannot do, one a line.
    """
    if mistakes := list(_of_target(target, budget, stages, whole=False)):
        raise RecipeError("\n".join(f"{dotted(mistake.at)}: {mistake.text}" for mistake in mistakes))


def _loaded(names: Iterable[Any], mistakes: list[Mistake]) -> Iterator[Target]:
    """The targets that can be read; what is wrong with the files of the others is a mistake."""
    for index, name in enumerate(names):
        if not isinstance(name, str):
            continue
        try:
            yield load_target(name)
        except TargetError as error:
            at: At = ("targets", index)
            mistakes.append(Mistake(at, str(error)))


def _of_target(target: Target, budget: Budget, stages: Mapping[str, Any], *, whole: bool = True) -> Iterator[Mistake]:
    yield from _forms(target, stages, whole=whole)
    yield from _sizes(target, budget)
    yield from _zeros(target, stages)
    if whole or "search" in stages:
        yield from _latency(target, budget, stages)


CONVERTERS = {"int8_tflite": ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")}
"""Packages without which a form cannot even be written."""


def _forms(target: Target, stages: Mapping[str, Any], *, whole: bool) -> Iterator[Mistake]:
    """Whether the form that quantize is asked for, or the float form without it, is one that the target runs."""
    stage = stages.get("quantize")
    if isinstance(stage, Quantize):
        at: At = ("stages", list(stages).index("quantize"), "quantize", "lowering")
        if not candidates(stage.lowering, target):
            choices = [form for form in target.forms if form in CHOICES]
            yield Mistake(
                at,
                f"target {target.name} needs {_needs(target)}; your recipe asks quantize.lowering: {stage.lowering}; "
                f"choose one of: {', '.join(('auto', *choices))}",
            )
    elif whole and not any(form.startswith(("fp", "bf")) for form in target.forms):
        yield Mistake(
            ("stages",), f"target {target.name} needs {_needs(target)}, and no stage quantizes: add `- quantize: {{}}`"
        )
    if all(form in CONVERTERS for form in target.forms):
        packages = dict.fromkeys(package for form in target.forms for package in CONVERTERS[form])
        if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
            yield Mistake(
                ("targets",),
                f"target {target.name} takes {', '.join(target.forms)}, which cannot be made here without "
                f"{', '.join(missing)}: pip install 'edgekd[{target.runtime}]'",
            )


def _needs(target: Target) -> str:
    precisions = dict.fromkeys(form_precision(form) for form in target.forms)
    return ("static shapes and " if target.is_static else "") + " or ".join(precisions)


def _zeros(target: Target, stages: Mapping[str, Any]) -> Iterator[Mistake]:
    """A share of zeros that the pattern which the target profits from does not have."""
    stage = stages.get("sparsify")
    if isinstance(stage, Sparsify) and (said := other_share(stage.pattern, stage.sparsity, target)):
        yield Mistake(("stages", list(stages).index("sparsify"), "sparsify", "sparsity"), said)


def remarks(targets: Iterable[Target], stages: Mapping[str, Any]) -> list[str]:
    """What is not wrong with the stages, but better said before hours of training than after."""
    stage = stages.get("sparsify")
    if not isinstance(stage, Sparsify):
        return []
    said = (remark(stage.pattern, target) for target in targets)
    return [f"sparsify: {text}" for text in said if text]


def _sizes(target: Target, budget: Budget) -> Iterator[Mistake]:
    """Examples at once, threads and megabytes against what the target has."""
    if target.max_batch is not None and budget.batch > target.max_batch:
        yield Mistake(
            ("budget", "batch"),
            f"target {target.name} takes at most {target.max_batch} example(s) at once; got {budget.batch}",
        )
    here = target.reach_by == "local" and target.device == "cpu" and not target.cpus
    cpus = len(host.logical_cpus()) if here and unavailable(target) is None else len(target.cpus)
    if budget.threads is not None and cpus and budget.threads > cpus:
        yield Mistake(("budget", "threads"), f"target {target.name} has {cpus} CPUs to run on; got {budget.threads}")
    if target.memory_mb and budget.size_mb and budget.size_mb * 1e6 > target.memory_mb * 2**20:
        yield Mistake(
            ("budget", "size_mb"),
            f"target {target.name} has {target.memory_mb} MiB of memory in all; got {budget.size_mb:g} MB",
        )


def _latency(target: Target, budget: Budget, stages: Mapping[str, Any]) -> Iterator[Mistake]:
    """A limit on latency where none can be known: better said now than after the training."""
    if not budget.asks_latency or getattr(stages.get("search"), "table", None):
        return
    if (reason := unavailable(target)) is None:
        return
    key = "speedup" if budget.speedup is not None else "latency_p95_ms"
    reach = "" if is_estimated(target) else (
        "reach the device over ssh (`reach: {ssh: {host: …}}` in a copy of its target file, see docs/targets.md), or "
    )  # fmt: skip
    yield Mistake(
        ("budget", key),
        f"this cannot be judged, because target {target.name} gives no latency from here: {reason}; {reach}"
        "give size_mb instead and cut to a fixed shape with prune (layers, heads, neurons) and without search",
    )
