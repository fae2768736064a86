"""The stages a recipe may name, and how the list of them is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgekd.distill import Distill
from edgekd.draft import Draft
from edgekd.errors import EdgekdError, RecipeError, unknown
from edgekd.operators import Operators
from edgekd.prune import Prune
from edgekd.quantize import Quantize
from edgekd.schema import At, Mistake, keys_of, read, show
from edgekd.search import Search
from edgekd.sparsify import Sparsify
from edgekd.supernet import Supernet
from edgekd.vocabulary import Vocabulary

Stage = Supernet | Search | Prune | Operators | Distill | Vocabulary | Quantize | Sparsify

STAGES: dict[str, type[Stage]] = {
    "supernet": Supernet,
    "search": Search,
    "prune": Prune,
    "operators": Operators,
    "distill": Distill,
    "vocabulary": Vocabulary,
    "quantize": Quantize,
    "sparsify": Sparsify,
}
"""The stages in the only order in which they may run."""

SHARED = ("supernet",)
"""Stages that do not depend on target and budget: a run does them once, for all its targets and rounds."""


def build_stage(name: str, settings: Mapping[str, Any], source: str = "--set") -> Stage:
    """Make one stage from plain settings.

    Raises:
        RecipeError: all mistakes, one a line.
    """
    draft = Draft()
    draft.merge(settings, source)
    draft.origins.setdefault((), (source, 0))
    mistakes: list[Mistake] = []
    stage = _stage(name, draft.value, (), mistakes)
    if stage is None or mistakes:
        for mistake in mistakes:
            draft.report(mistake)
        raise RecipeError("\n".join(draft.messages()))
    return stage


def read_stages(raw: Any, mistakes: list[Mistake]) -> dict[str, Stage]:
    """Read the `stages` list into settings by name, in order; what is wrong is added to `mistakes`."""
    if not isinstance(raw, list) or not raw:
        mistakes.append(Mistake(("stages",), f"expected a list of `- name: {{settings}}`, got {show(raw)}"))
        return {}
    stages: dict[str, Stage] = {}
    places: dict[str, int] = {}
    for index, item in enumerate(raw):
        at: At = ("stages", index)
        if not isinstance(item, Mapping) or len(item) != 1:
            hint = "; indent the settings under the name" if isinstance(item, Mapping) and item else ""
            mistakes.append(Mistake(at, f"expected one `- name: {{settings}}`, got {show(item)}{hint}"))
            continue
        ((name, settings),) = item.items()
        if name in places:
            mistakes.append(Mistake((*at, name), "this stage is already in the list; a stage runs once"))
            continue
        places[name] = index
        stage = _stage(name, {} if settings is None else settings, (*at, name), mistakes)
        if stage is not None:
            stages[name] = stage
    mistakes += _order(places)
    return stages


NEEDS_PRUNE = {
    "supernet": "supernet needs prune, which cuts a sub-network out of it",
    "search": "search needs prune, which cuts the model to the shape that search chooses",
}


def _order(places: Mapping[str, int]) -> Iterator[Mistake]:
    """What is wrong with the order of the stages, as far as their names are known; each has its place in the list."""
    known = [name for name in places if name in STAGES]
    sorted_names = [name for name in STAGES if name in known]
    if known != sorted_names:
        yield Mistake(("stages",), f"expected the order {', '.join(sorted_names)}; got {', '.join(known)}")
    if "prune" not in known:
        for name in (name for name in known if name in NEEDS_PRUNE):
            yield Mistake(("stages", places[name]), NEEDS_PRUNE[name], key=name)


def _stage(name: str, settings: Any, at: At, mistakes: list[Mistake]) -> Stage | None:
    if name not in STAGES:
        mistakes.append(Mistake(at[:-1], unknown("stage", name, STAGES), key=name))
        return None
    before = len(mistakes)
    values = read(keys_of(STAGES[name]), settings, at, mistakes)
    # A stage checks its own settings; one setting at a time tells which of them is wrong.
    for key in settings if isinstance(settings, Mapping) else ():
        if key in values:
            _make(name, {key: values[key]}, (*at, key), mistakes)
    return _make(name, values, at, mistakes) if len(mistakes) == before else None


def _make(name: str, values: Mapping[str, Any], at: At, mistakes: list[Mistake]) -> Stage | None:
    try:
        return STAGES[name](**values)
    except (EdgekdError, ValueError) as error:
        mistakes.append(Mistake(at, str(error)))
        return None
