"""A recipe: teacher, data, targets, budget and stages, checked as a whole before anything heavy is imported.

Every key is described in `docs/recipe.md`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from edgekd import yaml_lines
from edgekd.constraints import constraint_mistakes, fill_budget
from edgekd.context import Budget
from edgekd.draft import Draft, dotted
from edgekd.errors import RecipeError, nearest, unknown
from edgekd.files import sha256_json
from edgekd.recipe_paths import path_mistakes
from edgekd.schema import At, Key, Mistake, keys_of, read
from edgekd.stages import STAGES, Stage, build_stage, read_stages

if TYPE_CHECKING:
    from edgekd.data import DataSpec

__all__ = [
    "PRESETS",
    "STAGES",
    "Data",
    "Recipe",
    "Stage",
    "build_recipe",
    "build_stage",
    "check_paths",
    "load_recipe",
    "preset_text",
]

PRESETS = ("balanced", "fast", "accurate", "small")

_BOUNDS: dict[str, Any] = {
    "latency_p95_ms": Gt(0),
    "speedup": Gt(1),
    "batch": Ge(1),
    "sequence": Ge(1),
    "threads": Ge(1),
    "size_mb": Gt(0),
    "accuracy_drop": Interval(ge=0, lt=1),
    "min_accuracy": Interval(gt=0, le=1),
}
_EXCLUSIVE = (("latency_p95_ms", "speedup"), ("accuracy_drop", "min_accuracy"))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the examples are: the `data` section. See `edgekd.data.DataSpec` for what the keys mean."""

    path: Annotated[str, MinLen(1)]
    columns: Mapping[Literal["text", "text_pair", "image", "label"], str] = field(default_factory=dict)
    splits: Mapping[Literal["train", "validation", "test"], str] = field(default_factory=dict)
    unlabeled: str | None = None
    limit: Annotated[int, Ge(1)] | None = None
    max_length: Annotated[int, Ge(1)] | None = None
    validation_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.1

    def spec(self, seed: int) -> DataSpec:
        """What `edgekd.data.load_splits` takes."""
        from edgekd.data import DataSpec

        keys = {key.name for key in dataclasses.fields(self)} - {"max_length"}
        return DataSpec(**{key: getattr(self, key) for key in keys}, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is asked for. `stages` maps names to settings in the order they run; `task` None is inferred."""

    teacher: Annotated[str, MinLen(1)]
    data: Data
    budget: Budget
    stages: Mapping[str, Stage]
    targets: Annotated[tuple[str, ...], MinLen(1)] = ("local",)
    task: str | None = None
    seed: Annotated[int, Ge(0)] = 0
    max_rounds: Annotated[int, Ge(1)] = 3

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it could stand in a file, defaults filled in; keys that are not set are left out."""
        return {
            "teacher": self.teacher,
            **({"task": self.task} if self.task else {}),
            "data": _plain(self.data),
            "targets": list(self.targets),
            "budget": {**_plain(self.budget), "max_rounds": self.max_rounds},
            "seed": self.seed,
            "stages": [{name: _plain(stage)} for name, stage in self.stages.items()],
        }

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `load_recipe` reads an equal recipe from it."""
        return yaml_lines.dump(self.to_dict())

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of `to_dict`."""
        return sha256_json(self.to_dict())


def load_recipe(
    path_or_preset: str | Path,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    paths: bool = True,
) -> Recipe:
    """Read a recipe from a file or start from a preset, lay `values` over it, then each `key.key=value` override.

    `values` is nested like the file (`{"budget": {"speedup": 4}}`). A recipe without stages gets those of `balanced`.
    With `paths`, what the recipe names (data, teacher, targets, task) must exist, as far as that is cheap to see, and
    the targets must be able to do what is asked (`edgekd.constraints`). What the budget leaves open, the targets fill.

    Raises:
        RecipeError: all mistakes, one a line, each with file and line (or `--set`), key, what was expected, what was
            got and the nearest valid name.
    """
    name = str(path_or_preset)
    draft = Draft()
    draft.read(_text(name), f"preset {name}" if name in PRESETS else name)
    if draft.value or not draft.found:
        _normalize(draft, strict=True)
        draft.merge(values or {}, "command line")
        if draft.get(("stages",)) is None:
            draft.merge({"stages": yaml_lines.parse(_text("balanced")).value["stages"]}, "preset balanced")
        _normalize(draft)
        for override in overrides:
            _override(draft, override)
        _normalize(draft)
        recipe = _check(draft, paths)
        if recipe is not None:
            return recipe
    raise RecipeError("\n".join(draft.messages()))


def build_recipe(
    *,
    teacher: str | Path,
    data: str | Path | Mapping[str, Any],
    budget: Mapping[str, Any],
    targets: Sequence[str] = ("local",),
    task: str | None = None,
    seed: int = 0,
    stages: Sequence[Any] | None = None,
    preset: str = "balanced",
    overrides: Sequence[str] = (),
) -> Recipe:
    """Make a recipe without a file: a preset with the rest filled in; `data` is a path or the keys of that section.

    Raises:
        RecipeError: as `load_recipe`.
    """
    preset_text(preset)
    values: dict[str, Any] = {"teacher": str(teacher), "targets": list(targets), "task": task, "seed": seed}
    values["data"] = {"path": str(data)} if isinstance(data, str | Path) else data
    values["budget"] = {key: value for key, value in budget.items() if value is not None}
    if stages is not None:
        values["stages"] = list(stages)
    return load_recipe(preset, overrides, values)


def check_paths(recipe: Recipe) -> None:
    """Check that what the recipe names exists, as far as that is cheap to see.

    Raises:
        RecipeError: all that is not there, one a line.
    """
    if mistakes := path_mistakes(recipe.to_dict()):
        raise RecipeError("\n".join(f"{dotted(mistake.at)}: {mistake.text}" for mistake in mistakes))


def _normalize(draft: Draft, *, strict: bool = False) -> None:
    """Write the short forms out: `target: x` as a list of targets, a bare stage name as a stage without settings."""
    if strict and {"target", "targets"} <= draft.value.keys():
        draft.report(Mistake((), "give target or targets, not both", key="target"))
    if "target" in draft.value:
        source = draft.origin(("target",))
        draft.value["targets"] = draft.value.pop("target")
        draft.origins[("targets",)] = source
    if isinstance(draft.get(("targets",)), str):
        draft.value["targets"] = [draft.value["targets"]]
    stages = draft.get(("stages",))
    if isinstance(stages, list):
        draft.value["stages"] = [{stage: None} if isinstance(stage, str) else stage for stage in stages]


def _override(draft: Draft, override: str) -> None:
    """Lay one `key.key=value` over the draft; a stage is addressed by its name."""
    dotted_key, equals, text = override.partition("=")
    at: At = tuple(dotted_key.strip().split("."))
    source = ("--set", 0)
    if not equals or "" in at:
        draft.found.append((source, f"expected KEY=VALUE such as budget.speedup=4, got {override!r}"))
        return
    if at[0] == "stages" and len(at) > 1:
        stages = [stage for stage in draft.get(("stages",)) or () if isinstance(stage, dict)]
        places = {name: index for index, stage in enumerate(stages) for name in stage}
        if at[1] not in places:
            draft.found.append((source, f"{dotted_key}: {_no_stage(str(at[1]), list(places))}"))
            return
        at = ("stages", places[at[1]], *at[1:])
    try:
        document = yaml_lines.parse(text)
    except ValueError as error:
        draft.found.append((source, f"{dotted_key}: not valid YAML: {error}"))
        return
    draft.found += [(source, f"{dotted_key}: {mistake.text}") for mistake in document.mistakes]
    draft.put(at, document.value, "--set")


def _no_stage(name: str, there: Sequence[str]) -> str:
    """What to say of a setting for a stage that the recipe does not have."""
    if name not in STAGES:
        return unknown("stage of this recipe", name, there)
    earlier = [stage for stage in list(STAGES)[: list(STAGES).index(name)] if stage in there]
    return (
        f"{name} is not among the stages of this recipe ({', '.join(map(str, there)) or 'none'}); to add it, write "
        f"`- {name}: {{}}` {f'after {earlier[-1]}' if earlier else 'first'} in its list of stages "
        "(`edgekd init` writes a recipe to start from)"
    )


def _check(draft: Draft, paths: bool) -> Recipe | None:
    """Turn a draft into a recipe, or note all that is wrong with it."""
    mistakes: list[Mistake] = []
    fill_budget(draft)
    keys = keys_of(Recipe)
    del keys["max_rounds"]
    sections = {name: Key(Any, keys[name].default) for name in _SECTIONS}
    values = read({**keys, **sections}, draft.value, (), mistakes)
    parts = {name: _SECTIONS[name](values[name], mistakes) for name in sections if name in values}
    mistakes += path_mistakes(draft.value) if paths else []
    for mistake in mistakes:
        draft.report(mistake)
    if draft.found:
        return None
    max_rounds = parts["budget"].pop("max_rounds")
    budget = Budget(**parts["budget"])
    for mistake in constraint_mistakes(budget, parts["stages"], values["targets"]) if paths else ():
        draft.report(mistake)
    return None if draft.found else Recipe(**{**values, **parts, "budget": budget, "max_rounds": max_rounds})


def _data(raw: Any, mistakes: list[Mistake]) -> Data | None:
    before = len(mistakes)
    values = read(keys_of(Data), raw, ("data",), mistakes)
    return Data(**values) if len(mistakes) == before else None


def _budget(raw: Any, mistakes: list[Mistake]) -> dict[str, Any]:
    keys = {**keys_of(Budget, _BOUNDS), "max_rounds": keys_of(Recipe)["max_rounds"]}
    values = read(keys, raw, ("budget",), mistakes)
    if not isinstance(raw, Mapping):
        return values
    given = {key for key, value in raw.items() if value is not None}
    for one, other in _EXCLUSIVE:
        if {one, other} <= given:
            mistakes.append(Mistake(("budget",), f"give {one} or {other}, not both", key=other))
    if not given & {"latency_p95_ms", "speedup", "size_mb"}:
        mistakes.append(Mistake(("budget",), "give latency_p95_ms (milliseconds), speedup (a ratio) or size_mb"))
    return values


_SECTIONS: dict[str, Callable[[Any, list[Mistake]], Any]] = {"data": _data, "budget": _budget, "stages": read_stages}


def preset_text(name: str) -> str:
    """The YAML text of a preset, comments and all.

    Raises:
        RecipeError: there is no such preset.
    """
    if name not in PRESETS:
        raise RecipeError(unknown("preset", name, PRESETS))
    return _text(name)


def _text(name: str) -> str:
    path = Path(__file__).parent / "recipes" / f"{name}.yaml" if name in PRESETS else Path(name)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        close = nearest(name, PRESETS) or f"; presets: {', '.join(PRESETS)}"
        raise RecipeError(f"there is no recipe file or preset {name!r}{close}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{name}: not a UTF-8 text file") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {name}: {error.strerror}") from None


def _plain(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain data, without those that are None by default too."""
    plain = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if value is not None or item.default is not None:
            plain[item.name] = _listed(value)
    return plain


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, tuple | list) else value
