"""A recipe means one thing, survives being written out, and every mistake in it is named at once."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Interval
from click.testing import CliRunner

from edgekd import yaml_lines
from edgekd.cli.init import command as init
from edgekd.context import Budget
from edgekd.data import DataSpec
from edgekd.errors import RecipeError
from edgekd.recipe import (
    PRESETS,
    STAGES,
    Data,
    Recipe,
    build_recipe,
    build_stage,
    check_paths,
    load_recipe,
    preset_text,
)
from edgekd.schema import Mistake, keys_of, read
from edgekd.target import shipped_targets_dir

ROOT = Path(__file__).parent.parent

GOOD = """\
teacher: someone/teacher
data:
  path: sklearn:digits
budget:
  speedup: 4
stages:
  - search
  - prune:
  - distill: {epochs: 2, learning_rate: 5e-5}
  - quantize: {}
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str, **arguments) -> Recipe:
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe("recipe.yaml", overrides, **arguments)


def mistakes(text: str, *overrides: str, **arguments) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, **arguments)
    return str(caught.value).split("\n")


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


# Meaning


def test_defaults_are_filled_in():
    recipe = load(GOOD)
    assert (recipe.targets, recipe.task, recipe.seed, recipe.max_rounds) == (("local",), None, 0, 3)
    assert recipe.budget == Budget(speedup=4.0)
    assert recipe.data == Data(path="sklearn:digits")
    assert list(recipe.stages) == ["search", "prune", "distill", "quantize"]
    assert recipe.stages["distill"] == STAGES["distill"](epochs=2, learning_rate=5e-5)
    assert recipe.stages["search"] == STAGES["search"]()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_make_recipes_that_survive_being_written_out(preset):
    recipe = build_recipe(teacher="t", data="d", budget={"latency_p95_ms": 4, "speedup": None}, preset=preset)
    again = load(recipe.to_yaml())
    assert again == recipe
    assert list(again.stages) == list(recipe.stages)
    assert {"search", "prune", "distill", "quantize"} <= set(recipe.stages)
    assert again.fingerprint() == recipe.fingerprint()


def test_a_full_recipe_survives_being_written_out():
    text = (
        GOOD
        + """\
task: text-classification
targets: [local]
seed: 7
"""
    )
    text = text.replace(
        "  path: sklearn:digits\n",
        "  path: 'no'\n  columns: {text: '5e-5', label: 'null'}\n  splits: {train: '010', test: 'true'}\n"
        "  unlabeled: 'é: #x'\n  limit: 9\n  max_length: 12\n  validation_fraction: 0.25\n",
    ).replace(
        "  speedup: 4\n",
        "  latency_p95_ms: 1e-3\n  batch: 2\n  sequence: 8\n  threads: 1\n  size_mb: 20\n  min_accuracy: 0.9\n"
        "  max_rounds: 1\n",
    )
    recipe = load(text)
    assert recipe.data.columns == {"text": "5e-5", "label": "null"}
    assert recipe.budget.latency_p95_ms == 0.001
    assert load(recipe.to_yaml()) == recipe


def test_the_fingerprint_knows_every_change_and_nothing_else():
    recipe = load(GOOD)
    assert load("# a comment\n" + changed("speedup: 4", "speedup: 4.0")).fingerprint() == recipe.fingerprint()
    others = ["seed=1", "budget.speedup=5", "data.limit=5", "stages.distill.epochs=3", "stages=[prune, quantize]"]
    assert len({recipe.fingerprint(), *(load(GOOD, other).fingerprint() for other in others)}) == 6


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(GOOD).seed = 1


@pytest.mark.parametrize("line", ["target: local", "targets: local", "targets: [local]"])
def test_one_target_may_be_given_bare(line):
    assert load(f"{GOOD}{line}\n").targets == ("local",)


def test_stages_left_out_are_those_of_the_balanced_preset():
    recipe = load(GOOD[: GOOD.index("stages:")])
    assert recipe.stages == build_recipe(teacher="t", data="d", budget={"speedup": 2}).stages


def test_values_and_then_overrides_are_laid_over_the_file():
    recipe = load(GOOD, "budget.speedup=6", values={"budget": {"speedup": 5, "batch": 8}, "target": "local"})
    assert (recipe.budget.speedup, recipe.budget.batch) == (6.0, 8)


def test_an_override_can_switch_the_kind_of_limit():
    recipe = load(GOOD, "budget.speedup=null", "budget.latency_p95_ms=3.5", "data.columns.text=review")
    assert recipe.budget == Budget(latency_p95_ms=3.5)
    assert recipe.data.columns == {"text": "review"}


def test_the_data_section_is_a_data_spec():
    keys = {key.name for key in dataclasses.fields(Data)} - {"max_length"} | {"seed"}
    assert keys == {key.name for key in dataclasses.fields(DataSpec)}
    assert Data(path="x", limit=3).spec(seed=5) == DataSpec(path="x", limit=3, seed=5)


# Types in words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    shape: Literal["linear", "cosine"] = "linear"
    counts: int | list[int] | None = None
    share: Annotated[float, Interval(ge=0, le=1)] | None = None
    nested: Mapping[str, float | Mapping[str, float]] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"shape": "cosin"}, "expected one of: linear, cosine, got 'cosin' (did you mean 'cosine'?)"),
        ({"shape": 3}, "expected one of: linear, cosine, got 3"),
        ({"counts": [1, "a"]}, 'expected a whole number or a list, each item a whole number, got [1, "a"]'),
        ({"share": 2}, "expected a number of at least 0 and of at most 1, got 2"),
        ({"share": float("nan")}, "expected a number of at least 0 and of at most 1, got NaN"),
        ({"nested": {"a": "b"}}, "expected a mapping, each value a number or a mapping, each value a number, got"),
        ({"names": "a"}, "expected a list, each item a text, got 'a'"),
        ({"names": ["a" * 100]}, ""),
        ({"names": ["a", 3 * "long " * 50, 1]}, "…"),
    ],
)
def test_a_wrong_value_is_told_what_its_type_allows(raw, message):
    found: list[Mistake] = []
    values = read(keys_of(Sample), raw, (), found)
    assert [message in mistake.text for mistake in found] == ([True] if message else []), found
    assert values.keys() == {key.name for key in dataclasses.fields(Sample)} - {mistake.at[0] for mistake in found}


# Mistakes

ONE = [
    ("speedup: 4", "speedup: fast", "5: budget.speedup: expected a number above 1, got 'fast'"),
    ("speedup: 4", "speedup: 1", "5: budget.speedup: expected a number above 1, got 1"),
    ("speedup: 4", "speedup: .inf", "5: budget.speedup: expected a number above 1, got Infinity"),
    ("speedup: 4", "speedup: true", "5: budget.speedup: expected a number above 1, got true"),
    ("  speedup: 4", "  spedup: 4\n  size_mb: 3", "5: budget: unknown key 'spedup' (did you mean 'speedup'?)"),
    ("speedup: 4", "batch: 2", "4: budget: give latency_p95_ms (milliseconds), speedup (a ratio) or size_mb"),
    ("speedup: 4", "speedup: 4\n  latency_p95_ms: 2", "5: budget: give latency_p95_ms or speedup, not both"),
    (
        "speedup: 4",
        "speedup: 4\n  accuracy_drop: 0\n  min_accuracy: 1",
        "7: budget: give accuracy_drop or min_accuracy, not both",
    ),
    (
        "speedup: 4",
        "speedup: 4\n  accuracy_drop: 2",
        "6: budget.accuracy_drop: expected a number of at least 0 and below 1, got 2",
    ),
    ("speedup: 4", "speedup: 4\n  batch: 1.5", "6: budget.batch: expected a whole number of at least 1, got 1.5"),
    ("speedup: 4", "speedup: 4\n  max_rounds: 0", "6: budget.max_rounds: expected a whole number of at least 1, got 0"),
    ("speedup: 4", "speedup: 4\n  speedup: 5", "6: budget: duplicate key 'speedup' (first on line 5)"),
    ("teacher: someone/teacher\n", "", "1: missing key 'teacher': expected a text that is not empty"),
    ("teacher: someone/teacher", "teacher: ''", "1: teacher: expected a text that is not empty, got ''"),
    ("teacher: someone/teacher", "teacher: 3", "1: teacher: expected a text that is not empty, got 3"),
    ("teacher: someone/teacher", "teacher: ./gone", "1: teacher: there is no folder './gone'"),
    ("teacher: someone/teacher", "teacher: recipe.yaml", "1: teacher: expected the folder of a model, got the file"),
    ("path: sklearn:digits", "path: gone.csv", "3: data.path: there is no file or folder 'gone.csv'"),
    ("path: sklearn:digits", "path: x\n  unlabeled: ./y", "4: data.unlabeled: there is no file or folder './y'"),
    (
        "path: sklearn:digits",
        "path: x\n  columns: {txt: a}",
        "4: data.columns: unknown key 'txt' (did you mean 'text'?)",
    ),
    ("path: sklearn:digits", "path: x\n  columns: {text: 1}", "4: data.columns.text: expected a text, got 1"),
    ("path: sklearn:digits", "pth: x", "2: data: missing key 'path': expected a text that is not empty"),
    (
        "data:\n  path: sklearn:digits",
        "data: x",
        "2: data: expected a mapping with keys columns, limit, max_length, path",
    ),
    ("stages:", "task: text-clasification\nstages:", "6: task: unknown task 'text-clasification' (did you mean"),
    ("stages:", "target: locl\nstages:", "6: targets[0]: unknown target 'locl' (did you mean 'local'?)"),
    ("stages:", "targets: []\nstages:", "6: targets: expected a list, each item a text that is not empty, got []"),
    ("stages:", "targets: [local, local]\nstages:", "6: targets[1]: 'local' is already in the list"),
    ("stages:", "targets: [a/b.yaml]\nstages:", "6: targets[0]: there is no target file 'a/b.yaml'"),
    ("stages:", "target: local\ntargets: [local]\nstages:", "6: give target or targets, not both"),
    ("stages:", "seed: -1\nstages:", "6: seed: expected a whole number of at least 0, got -1"),
    ("stages:", "seed: yes\nstages:", "6: seed: expected a whole number of at least 0, got 'yes'"),
    ("stages:", "seed: 010\nstages:", "6: seed: expected a whole number of at least 0, got '010'"),
    ("stages:", "seed: !!binary aGk=\nstages:", "6: seed: expected a plain value, got one tagged"),
    ("stages:", "[a]: 1\nstages:", "6: expected a text as key, got a list or mapping"),
    ("epochs: 2", "epoch: 2", "9: stages.distill: unknown key 'epoch' (did you mean 'epochs'?)"),
    ("epochs: 2", "epochs: two", "9: stages.distill.epochs: expected a whole number"),
    ("epochs: 2", "epochs: 0", "9: stages.distill.epochs: "),
    ("epochs: 2", "schedule: cosin", "9: stages.distill.schedule: "),
    ("quantize: {}", "quantise: {}", "10: stages: unknown stage 'quantise' (did you mean 'quantize'?)"),
    ("quantize: {}", "sparsify: {pattern: 2:5}", "10: stages.sparsify.pattern: expected one of: "),
    ("quantize: {}", "search: {}", "10: stages.search: this stage is already in the list; a stage runs once"),
    ("quantize: {}", "quantize: 8", "10: stages.quantize: expected a mapping with keys "),
    ("quantize: {}", "{}", "10: stages: expected one `- name: {settings}`, got {}"),
    ("  - prune:\n", "", "7: stages: search needs prune, which cuts the model to the shape that search chooses"),
    ("  - search\n  - prune:\n", "  - supernet\n", "7: stages: supernet needs prune, which cuts a sub-network out"),
    ("  - search\n  - prune:\n", "  - prune:\n  - search:\n", "6: stages: expected the order search, prune, distill"),
    (GOOD[GOOD.index("stages:") :], "stages: []", "6: stages: expected a list of `- name: {settings}`, got []"),
    (GOOD[GOOD.index("stages:") :], "stages: {prune: {}}", "6: stages: expected a list of `- name: {settings}`"),
    ("{epochs: 2, learning_rate: 5e-5}", "\n    epochs: 2", "9: stages: expected one `- name: {settings}`, got "),
]


@pytest.mark.parametrize(("old", "new", "message"), ONE)
def test_each_mistake_is_named_with_line_and_key(old, new, message):
    found = mistakes(changed(old, new))
    assert any(line.startswith(f"recipe.yaml:{message}") for line in found), found
    assert len(found) <= 2


def test_two_targets_of_one_name_would_share_a_bundle(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(shipped_targets_dir() / "local.yaml", tmp_path / folder / "local.yaml")
    one, other = (str(tmp_path / folder / "local.yaml") for folder in ("a", "b"))
    for names in ([one, other], ["local", other]):
        [line] = mistakes(changed("stages:", f"targets: {names}\nstages:"))
        assert f"6: targets[1]: {other!r} is a target named 'local' like {names[0]!r}" in line
        assert "rename one of the files" in line
    shutil.move(other, tmp_path / "b" / "mine.yaml")
    assert load(changed("stages:", f"targets: [{one}, {tmp_path / 'b' / 'mine.yaml'}]\nstages:"), paths=True)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file():
    text = changed("speedup: 4", "speedup: fast\n  buget: 1").replace("teacher: ", "techer: ")
    text = text.replace("epochs: 2, learning_rate: 5e-5", "epochs: two, schedule: cosin").replace("quantize", "squeeze")
    assert [line.split(": ", 1)[0] for line in mistakes(text, "sed=1", "stages.distil.epochs=1", "x")] == [
        *("recipe.yaml:1", "recipe.yaml:1", "recipe.yaml:5", "recipe.yaml:6"),
        *("recipe.yaml:10", "recipe.yaml:10", "recipe.yaml:11"),
        *("--set", "--set", "--set"),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.speedup=fast", "--set: budget.speedup: expected a number above 1, got 'fast'"),
        ("budget.speeduup=4", "--set: budget: unknown key 'speeduup' (did you mean 'speedup'?)"),
        ("buget.speedup=4", "--set: unknown key 'buget' (did you mean 'budget'?)"),
        ("seed", "--set: expected KEY=VALUE such as budget.speedup=4, got 'seed'"),
        ("=4", "--set: expected KEY=VALUE such as budget.speedup=4, got '=4'"),
        ("seed.x=4", "--set: unknown key 'seed'"),
        ("teacher.x=4", "--set: teacher.x: teacher is 'someone/teacher', it has no keys"),
        ("seed={", "--set: seed: not valid YAML: line 1, column 2: "),
        ("stages.distil.epochs=4", "--set: stages.distil.epochs: unknown stage of this recipe 'distil' (did you mean"),
        (
            "stages.vocabulary.min_count=2",
            "--set: stages.vocabulary.min_count: vocabulary is not among the stages of this recipe (search, prune, "
            "distill, quantize); to add it, write `- vocabulary: {}` after distill in its list of stages",
        ),
        ("stages.supernet.epochs=2", "--set: stages.supernet.epochs: supernet is not among the stages of this recipe"),
        ("stages.distill.epochs=many", "--set: stages.distill.epochs: expected a whole number"),
        ("stages.distill=many", "--set: stages.distill: expected a mapping with keys "),
        ("stages=many", "--set: stages: expected a list of `- name: {settings}`, got 'many'"),
        ("target=locl", "--set: targets[0]: unknown target 'locl' (did you mean 'local'?)"),
    ],
)
def test_mistakes_of_overrides_name_set(override, message):
    found = mistakes(GOOD, override)
    if override == "seed.x=4":
        message = '--set: seed: expected a whole number of at least 0, got {"x": 4}'
    assert [line.startswith(message) for line in found] == [True], found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher: [x\nseed: 1\n", "recipe.yaml: not valid YAML: line 2, column 5: "),
        ("a: b: c", "recipe.yaml: not valid YAML: line 1, column 5: mapping values are not allowed here"),
        ("a: &x 1\nb: *x", "recipe.yaml: not valid YAML: line 1, column 4: anchors and aliases are not supported"),
        ("a: !!python/object:os.system x", "recipe.yaml: not valid YAML: line 1, column 4: could not determine"),
        ("a: 1\n---\nb: 2", "recipe.yaml: not valid YAML: line 2, column 1: but found another document"),
        ("[" * 5000, "recipe.yaml: not valid YAML: line 1, column 1: nested too deeply"),
        ("", "recipe.yaml:1: expected `key: value` lines, got null"),
        ("- a\n- b", 'recipe.yaml:1: expected `key: value` lines, got ["a", "b"]'),
        ("{}", "recipe.yaml:1: missing key 'teacher'"),
        ("a: \x07", "recipe.yaml: not valid YAML: unacceptable character"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused_with_its_place(text, message):
    assert mistakes(text)[0].startswith(message), mistakes(text)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    Path("latin.yaml").write_bytes("teacher: é".encode("latin-1"))
    for name, message in {
        "balancd": "there is no recipe file or preset 'balancd' (did you mean 'balanced'?)",
        "gone.yaml": "there is no recipe file or preset 'gone.yaml'; presets: balanced, fast, accurate, small",
        "latin.yaml": "latin.yaml: not a UTF-8 text file",
        str(tmp_path): f"cannot read the recipe {tmp_path}: Is a directory",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert str(caught.value) == message


def test_mistakes_on_the_command_line_say_so():
    with pytest.raises(RecipeError) as caught:
        build_recipe(teacher="t", data={"path": "d", "limt": 3}, budget={"speedup": 0.5})
    assert str(caught.value).split("\n") == [
        "command line: data: unknown key 'limt' (did you mean 'limit'?)",
        "command line: budget.speedup: expected a number above 1, got 0.5",
    ]
    with pytest.raises(RecipeError, match=r"command line: budget: give latency_p95_ms"):
        build_recipe(teacher="t", data="d", budget={})
    with pytest.raises(RecipeError, match=r"unknown preset 'fats' \(did you mean 'fast'\?\)"):
        build_recipe(teacher="t", data="d", budget={"speedup": 2}, preset="fats")


def test_one_stage_is_built_from_settings_alone():
    assert build_stage("distill", {"epochs": 3}) == STAGES["distill"](epochs=3)
    with pytest.raises(RecipeError) as caught:
        build_stage("distill", {"epochs": "x", "schedul": "linear"})
    first, second = str(caught.value).split("\n")
    assert first == "--set: unknown key 'schedul' (did you mean 'schedule'?)"
    assert second.startswith("--set: epochs: expected a whole number")


def test_paths_are_checked_when_asked():
    recipe = load(changed("sklearn:digits", "gone.csv"), paths=False)
    with pytest.raises(RecipeError, match=r"^data\.path: there is no file or folder 'gone\.csv'$"):
        check_paths(recipe)
    Path("gone.csv").touch()
    check_paths(recipe)


def test_a_teacher_folder_needs_a_config():
    Path("teacher").mkdir()
    text = changed("someone/teacher", "teacher")
    assert mistakes(text) == [
        "recipe.yaml:1: teacher: there is no config.json in 'teacher'; expected a model folder of transformers"
    ]
    Path("teacher/config.json").write_text("{}")
    assert load(text).teacher == "teacher"


def test_mistakes_are_found_without_importing_anything_heavy():
    program = (
        "import sys\nfrom edgekd.recipe import load_recipe\n"
        "try:\n    load_recipe(sys.argv[1])\nexcept Exception as error:\n    print(error)\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'datasets', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    file = Path("recipe.yaml").absolute()
    file.write_text(changed("speedup: 4", "speedup: fast"))
    command = [sys.executable, "-c", program, str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out == f"{file}:5: budget.speedup: expected a number above 1, got 'fast'\n[]\n"


# YAML


@pytest.mark.parametrize(
    "value",
    [
        {"text": ["5e-5", "yes", "no", "null", "~", "", " x ", "010", "1:30", "2020-01-01", "é\n", "<<", "=", "0x1f"]},
        {"number": [5e-5, 1.0, -0.5, 1e300, 3, -7, 0], "other": [True, False, None, [], {}]},
    ],
)
def test_yaml_written_reads_back_the_same(value):
    assert yaml_lines.parse(yaml_lines.dump(value)).value == value


def test_yaml_scalars_are_those_of_version_1_2():
    text = "[5e-5, 1., .5, yes, off, 010, 1:30, 2020-01-01, ~, True, .inf, 1_000]"
    expected = [5e-5, 1.0, 0.5, "yes", "off", "010", "1:30", "2020-01-01", None, True, float("inf"), "1_000"]
    assert yaml_lines.parse(text).value == expected


# edgekd init


@pytest.mark.parametrize("preset", PRESETS)
def test_init_writes_a_recipe_that_is_that_of_the_preset(preset):
    result = CliRunner().invoke(init, ["new.yaml", "--preset", preset, "--teacher", "t: 1", "--data", "some/d"])
    assert (result.exit_code, result.output) == (0, "wrote new.yaml\n")
    assert preset_text(preset) in Path("new.yaml").read_text()
    budget = {"speedup": 4, "accuracy_drop": 0.02}
    assert load_recipe("new.yaml") == build_recipe(teacher="t: 1", data="some/d", budget=budget, preset=preset)


def test_every_line_that_init_comments_out_is_a_key_that_works():
    CliRunner().invoke(init, ["--teacher", "t", "--data", "d"])
    lines = Path("recipe.yaml").read_text().splitlines()
    commented = [line.replace("# ", "", 1) for line in lines if line.lstrip().startswith("# ")]
    keys = [line for line in commented if line.strip().split(":")[0].isidentifier() and line.strip()[0].islower()]
    assert len(keys) >= 9
    for line in keys:
        name, indented = line.strip().split(":")[0], line.startswith(" ")
        section = next((s for s in ("data", "budget") if indented and name in KEYS[s]), None)
        assert section or name in KEYS["top"], line


KEYS = {
    "top": {key.name for key in dataclasses.fields(Recipe)},
    "data": {key.name for key in dataclasses.fields(Data)},
    "budget": {key.name for key in dataclasses.fields(Budget)} | {"max_rounds"},
}


def test_init_does_not_overwrite_unless_forced():
    Path("recipe.yaml").write_text("mine")
    refused = CliRunner().invoke(init, [])
    assert isinstance(refused.exception, RecipeError)
    assert str(refused.exception) == "recipe.yaml exists; give another name, or --force to replace it"
    assert Path("recipe.yaml").read_text() == "mine"
    forced = CliRunner().invoke(init, ["--force", "--json"])
    assert json.loads(forced.stdout) == {"recipe": "recipe.yaml", "preset": "balanced"}
    assert Path("recipe.yaml").read_text() != "mine"


# Documentation


def documented() -> dict[str, dict[str, str]]:
    """The tables of docs/recipe.md: heading to key to default."""
    tables: dict[str, dict[str, str]] = {}
    for section in re.split(r"^##+ ", (ROOT / "docs/recipe.md").read_text("utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        tables[heading.strip("`")] = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, flags=re.MULTILINE))
    return tables


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_is_documented_with_its_default(stage):
    defaults = {name: key.default for name, key in keys_of(STAGES[stage]).items()}
    rows = documented()[stage]
    assert sorted(rows) == sorted(defaults)
    plain = build_stage(stage, {name: yaml_lines.parse(text.strip("`")).value for name, text in rows.items()})
    assert plain == STAGES[stage]()


def test_every_other_key_is_documented():
    tables = documented()
    assert sorted(tables["Top level"]) == sorted(KEYS["top"] - {"max_rounds"})
    assert sorted(tables["data"]) == sorted(KEYS["data"])
    assert sorted(tables["budget"]) == sorted(KEYS["budget"])
    text = (ROOT / "docs/recipe.md").read_text("utf-8")
    assert [name for name in (*PRESETS, *STAGES) if f"`{name}`" not in text] == []
