"""The same from Python as from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.context import Progress

if TYPE_CHECKING:
    from edgekd.latency.profiling import ProfileResult
    from edgekd.pipeline import Result
    from edgekd.student import Student


def compress(
    teacher: str | Path | None = None,
    *,
    out: str | Path,
    data: str | Path | Mapping[str, Any] | None = None,
    target: str | Path | Sequence[str | Path] | None = None,
    recipe: str | Path | None = None,
    preset: str | None = None,
    overrides: Sequence[str] | None = None,
    seed: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    **budget: Any,
) -> Result:
    """Compress a teacher for a device; see `edgekd compress --help`.

    Args:
        teacher: Hugging Face folder or hub id.
        out: run folder; the bundle is `out/bundle`.
        data: a path, or the `data` section of a recipe.
        target: one or several target names or files; `local` by default.
        recipe: a recipe file instead of a preset; whatever else is given is laid over it.
        preset: `balanced` (the default), `fast`, `accurate` or `small`.
        overrides: `key=value` changes, as `--set`.
        seed: of sampling and training; 0 by default.
        fresh: start anew instead of taking up what is in `out`.
        progress: where to report; silent by default.
        budget: `latency_p95_ms` or `speedup`, `batch`, `sequence`, `threads`, `size_mb`, `accuracy_drop`, …

    Raises:
        RecipeError: all mistakes in what is asked for.
        EdgekdError: what the data, the models or the folders get wrong.
    """
    from edgekd.errors import RecipeError
    from edgekd.pipeline import compress as run
    from edgekd.recipe import load_recipe, preset_text

    if recipe is not None and preset is not None:
        raise RecipeError("give a recipe or a preset, not both")
    if recipe is None and (teacher is None or data is None):
        raise RecipeError("compress needs a teacher and data, or a recipe")
    if recipe is None:
        preset_text(preset or "balanced")
    given = {
        "teacher": None if teacher is None else str(teacher),
        "data": {"path": str(data)} if isinstance(data, str | Path) else data,
        "targets": _names(target),
        "seed": seed,
        "budget": {key: value for key, value in budget.items() if value is not None} or None,
    }
    changes = [overrides] if isinstance(overrides, str) else list(overrides or ())
    values = {key: value for key, value in given.items() if value is not None}
    return run(load_recipe(recipe or preset or "balanced", changes, values), out, fresh=fresh, progress=progress)


def _names(target: str | Path | Sequence[str | Path] | None) -> list[str] | None:
    if target is None:
        return None
    return [str(target)] if isinstance(target, str | Path) else [str(name) for name in target]


def profile(model: str | Path, **settings: Any) -> ProfileResult:
    """Measure any ONNX model or bundle; arguments as `edgekd.latency.profiling.profile`."""
    from edgekd.latency.profiling import profile as run

    return run(model, **settings)


def evaluate(
    bundle: str | Path, data: str | Path | Mapping[str, Any], *, max_length: int | None = None
) -> dict[str, Any]:
    """Metric of a bundle's ONNX artifact with its 95 % interval.

    Raises:
        ModelError: not a bundle, or a damaged one.
        RecipeError: the section of the data has wrong keys or values.
        DataError: the data cannot be used.
    """
    from edgekd.errors import RecipeError
    from edgekd.pipeline import evaluate as run
    from edgekd.recipe import Data
    from edgekd.schema import Mistake, keys_of, read

    mistakes: list[Mistake] = []
    values = read(keys_of(Data), {"path": str(data)} if isinstance(data, str | Path) else data, ("data",), mistakes)
    if mistakes:
        raise RecipeError("; ".join(f"{'.'.join(map(str, mistake.at))}: {mistake.text}" for mistake in mistakes))
    section = Data(**values)
    return run(bundle, section.spec(0), max_length=max_length or section.max_length)


def load(folder: str | Path) -> Student:
    """Load a student (or teacher) folder, non-uniform shapes included; `.model` is the torch module.

    Raises:
        ModelError: the folder cannot be used.
    """
    from edgekd.student import load_student, local_folder, read_config
    from edgekd.tasks import get_task, infer_task

    path = local_folder(str(folder))
    return load_student(path, auto_class=get_task(infer_task(read_config(path))).auto_class)
