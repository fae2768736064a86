"""The same from Python as from the command line."""

from __future__ import annotations

from collections.abc import Mapping
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
    target: str | list[str] = "local",
    recipe: str | Path | None = None,
    preset: str = "balanced",
    overrides: list[str] | None = None,
    seed: int = 0,
    fresh: bool = False,
    progress: Progress | None = None,
    **budget: Any,
) -> Result:
    """Compress a teacher for a device; see `edgekd compress --help`.

    Args:
        teacher: Hugging Face folder or hub id.
        out: run folder; the bundle is `out/bundle`.
        data: a path, or the `data` section of a recipe.
        target: one or several target names or files.
        recipe: a recipe file, instead of teacher, data, target, preset and budget.
        preset: `balanced`, `fast`, `accurate` or `small`.
        overrides: `key=value` changes, as `--set`.
        seed: of sampling and training.
        fresh: start anew instead of taking up what is in `out`.
        progress: where to report; silent by default.
        budget: `latency_p95_ms` or `speedup`, `batch`, `sequence`, `threads`, `size_mb`, `accuracy_drop`, …

    Raises:
        RecipeError: all mistakes in what is asked for.
        EdgekdError: what the data, the models or the folders get wrong.
    """
    from edgekd.errors import RecipeError
    from edgekd.pipeline import compress as run
    from edgekd.recipe import build_recipe, load_recipe

    if recipe is not None:
        return run(load_recipe(recipe, overrides or ()), out, fresh=fresh, progress=progress)
    if teacher is None or data is None:
        raise RecipeError("compress needs a teacher and data, or a recipe")
    chosen = build_recipe(
        teacher=teacher,
        data=data,
        budget=budget,
        targets=[target] if isinstance(target, str) else target,
        seed=seed,
        preset=preset,
        overrides=overrides or (),
    )
    return run(chosen, out, fresh=fresh, progress=progress)


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
        DataError: the data cannot be used.
    """
    from edgekd.data import DataSpec
    from edgekd.pipeline import evaluate as run

    section = {"path": str(data)} if isinstance(data, str | Path) else dict(data)
    return run(bundle, DataSpec(**section), max_length=max_length)


def load(folder: str | Path) -> Student:
    """Load a student (or teacher) folder, non-uniform shapes included; `.model` is the torch module.

    Raises:
        ModelError: the folder cannot be used.
    """
    from edgekd.student import load_student, local_folder, read_config
    from edgekd.tasks import get_task, infer_task

    path = local_folder(str(folder))
    return load_student(path, auto_class=get_task(infer_task(read_config(path))).auto_class)
