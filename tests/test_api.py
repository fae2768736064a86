"""The same from Python: what is given counts, and what is wrong is said as on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd import pipeline
from edgekd.errors import ModelError, RecipeError
from edgekd.recipe import Recipe


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Recipes that would have been run."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(pipeline, "compress", lambda recipe, out, **_: recipes.append(recipe))
    return recipes


def test_what_is_given_is_laid_over_the_recipe(
    make_model: Callable[[str], Path], text_data: Path, tmp_path: Path, asked: list[Recipe]
) -> None:
    teacher, file = make_model("bert"), tmp_path / "recipe.yaml"
    file.write_text(
        f"teacher: {teacher}\ndata: {{path: {text_data}, limit: 9}}\nseed: 4\nbudget: {{speedup: 2}}\nstages: [prune]\n"
    )
    edgekd.compress(recipe=file, out=tmp_path / "run", speedup=3.0, overrides="data.limit=7")
    edgekd.compress(teacher, data=text_data, out=tmp_path / "run", speedup=3, target=Path("local"), preset="fast")
    first, second = asked
    assert (first.budget.speedup, first.data.limit, first.seed, list(first.stages)) == (3.0, 7, 4, ["prune"])
    assert (second.targets, second.seed, second.teacher) == (("local",), 0, str(teacher))
    with pytest.raises(RecipeError, match="give a recipe or a preset, not both"):
        edgekd.compress(recipe=file, preset="fast", out=tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pth": "x"}, "data: unknown key 'pth' .did you mean 'path'.*; data: missing key 'path'"),
        ({"path": "x", "limit": 0}, "data.limit: expected a whole number of at least 1, got 0"),
        (None, "data: expected a mapping with keys"),
    ],
)
def test_a_wrong_section_of_data_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        edgekd.evaluate(tmp_path, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": -1}, "threads: expected whole numbers of at least 1, got -1"),
        ({"batches": [1, 0]}, "batches: expected whole numbers of at least 1, got 0"),
        ({"speedup": 2.0}, "a speedup needs a baseline"),
        ({"feeds": "none.npz"}, "cannot read the inputs none.npz: No such file"),
    ],
)
def test_profile_refuses_what_the_command_line_refuses(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "small", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "small.onnx")
    with pytest.raises(ModelError, match=message):
        edgekd.profile(tmp_path / "small.onnx", **settings)
