from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from edgekd.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom edgekd.cli import main\n"
        "result = CliRunner().invoke(main, ['--help'])\nassert result.exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(result.output)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_every_command_has_a_module_and_every_module_a_line():
    files = {path.stem for path in (ROOT / "edgekd" / "cli").glob("*.py")}
    assert files - {"__init__", "common", "progress", "stage"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_goes_in_what_comes_out_and_gives_an_example(name):
    text = invoke(name, "--help").output
    assert re.search(r"\bIn:", text), text
    assert re.search(r"\bOut:", text), text
    assert f"edgekd {name}" in text
    assert "--json" in text
    assert "\\b" not in text
    assert "\b" not in text


def test_the_page_of_commands_is_what_the_commands_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "commands.py")], capture_output=True, text=True, check=True
    )
    assert done.stdout == (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def test_unknown_commands_and_options_are_usage_errors():
    assert invoke("compres").exit_code == 2
    done = invoke("profile", "x.onnx", "--treads", 1)
    assert done.exit_code == 2
    assert "--threads" in done.output


ALONE = ["x", "--data", "d", "--out", "y"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "--out", "x"],
        ["evaluate", "x"],
        ["prune", "x", "--out", "y"],
        ["search", *ALONE],
        ["distill", *ALONE],
    ],
)
def test_what_is_missing_is_named(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "give" in done.output


def test_errors_are_one_message_and_json_when_asked(tmp_path):
    done = process("compress", tmp_path, "--data", tmp_path, "--speedup", 2, "--out", tmp_path / "run", "--json")
    assert done.returncode == 2
    payload = json.loads(done.stdout)
    assert payload["error"]["kind"] == "RecipeError"
    assert "there is no config.json" in payload["error"]["message"]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("profile", "--json"), "UsageError", "give either MODEL or --compare A B"),
        (("profile", "x.onnx", "--threads", "many", "--json"), "UsageError", "'many' is not a valid integer"),
        (("profile", "x.onnx", "--treads", "1", "--json"), "UsageError", "--treads"),
        (("export", "x", "--json"), "UsageError", "--out"),
        (("targets", "shw", "--json"), "UsageError", "shw"),
        (("targets", "show", "nobody", "--json"), "TargetError", "unknown target 'nobody'"),
        (("init", "no/such/folder/recipe.yaml", "--json"), "StoreError", "cannot write no/such/folder/recipe.yaml"),
    ],
)
def test_whatever_is_wrong_json_is_json(arguments, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == kind
    assert message in error["message"]
    assert error["message"].splitlines()[0] in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--json",), ("--json", "list"), ("list", "--json"), ("--json", "show", "local")]
)
def test_targets_prints_json_wherever_the_option_stands(arguments):
    done = invoke("targets", *arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)


def test_a_recipe_with_five_mistakes_names_all_of_them(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "teacher: ./nowhere\nbuget: {}\ndata:\n  path: ./missing.jsonl\n  colums: {}\nbudget:\n  speedup: fast\n"
        "stages:\n  - prune: {criterio: activation}\n"
    )
    done = process("compress", "--recipe", recipe, "--out", tmp_path / "run")
    assert done.returncode == 2
    for line, text in [
        (1, "./nowhere"),
        (2, "budget"),
        (4, "missing.jsonl"),
        (5, "columns"),
        (7, "fast"),
        (9, "criterion"),
    ]:
        assert re.search(rf"recipe.yaml:{line}: .*{re.escape(text)}", done.stderr), (line, done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_weights_is_refused_before_anything_is_written(make_model, text_data, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_bytes((make_model("bert") / "config.json").read_bytes())
    done = invoke("compress", teacher, "--data", text_data, "--speedup", 2, "--out", tmp_path / "run", "-q")
    assert done.exit_code == 2
    assert "model.safetensors is missing" in done.output
    assert not (tmp_path / "run").exists()


def test_a_wrong_label_column_is_named(make_model, text_data, tmp_path):
    done = invoke(
        "compress", make_model("bert"), "--data", text_data, "--column", "label=lable", "--speedup", 2,
        "--out", tmp_path / "run", "-q",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "lable" in done.output
    assert "label" in done.output


def test_an_output_that_cannot_be_written_is_refused(make_model, text_data, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    done = invoke("compress", make_model("bert"), "--data", text_data, "--speedup", 2, "--out", blocked, "-q")
    assert done.exit_code == 2
    assert "it is a file" in done.output
    assert blocked.read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "MODEL", "--data", "DATA", "--speedup", 2, "--out"),
        ("finetune", "no-model", "--data", "no-data", "--out"),
        ("export", "no-model", "--out"),
        ("prune", "no-model", "--data", "no-data", "--out"),
        ("calibrate", "--body", "no-body", "--out"),
        ("calibrate", "--target", "npu-ethos-u85-512", "--body", "no-body", "--models"),
        ("profile", "no.onnx", "--report"),
        ("profile", "no.onnx", "--plots"),
        ("profile", "no.onnx", "--target", "npu-ethos-u85-512", "--out"),
        ("init",),
        ("demo", "--out"),
    ],
)
def test_an_output_below_a_file_is_refused_before_any_work(make_model, text_data, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    named = {"MODEL": make_model("bert"), "DATA": text_data}
    done = invoke(*(named.get(word, word) for word in arguments), tmp_path / "file" / "deep" / "out.json")
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert "cannot write" in done.output
    assert "no-model" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_whole_way_stage_by_stage(make_model, text_data, tmp_path):
    teacher, data = make_model("bert"), ["--data", text_data]
    steps = [
        ("prune", teacher, "pruned", ["--set", "layers=[0,2]", "--set", "heads=2", "--set", "neurons=32"]),
        ("distill", tmp_path / "pruned", "distilled", ["--teacher", teacher, "--set", "epochs=1"]),
        ("quantize", tmp_path / "distilled", "quantized", ["--set", "lowering=int8_dynamic"]),
    ]
    for name, source, out, settings in steps:
        done = invoke(name, source, *data, "--out", tmp_path / out, *settings, "--json", "-q")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["shape"] == "2 layers of 32: heads 2/2, neurons 32/32"
        assert not list(tmp_path.glob(".*"))
    bundle = tmp_path / "bundle"
    done = invoke("export", tmp_path / "quantized", *data, "--sequence", 16, "--out", bundle, "--json")
    assert done.exit_code == 0, done.output
    stated = json.loads(done.stdout)["quality"]
    done = invoke("evaluate", bundle, *data, "--json")
    assert json.loads(done.stdout)["value"] == stated["value"]
    done = invoke("profile", bundle, "--threads", 1, "--sequence", 16, "--json", "-q")
    latency = json.loads(done.stdout)["latency"][0]
    assert (latency["kind"], latency["threads"], latency["sequence"]) == ("measured", 1, 16)


def test_search_foresees_the_operators_it_is_told_of(make_model, text_data, tmp_path, monkeypatch):
    from edgekd.operators import Operators
    from edgekd.prune import Prune
    from edgekd.search import Search

    seen = []
    for stage in (Search, Prune):
        monkeypatch.setattr(stage, "run", lambda self, student, ctx: seen.append(ctx.reshape) or student)
    common = [make_model("bert"), "--data", text_data, "-q"]
    search, prune = ["search", *common, "--speedup", 2, "--sequence", 16], ["prune", *common]
    operators = ["--operators", "{force: true}"]
    for number, command in enumerate(([*search, *operators], search, [*prune, *operators])):
        done = invoke(*command, "--out", tmp_path / str(number))
        assert done.exit_code == 0, done.output
    assert seen[0].__self__ == Operators(force=True)
    shape = object()
    assert seen[1](shape) is shape
    assert seen[2](shape) is shape, "prune cuts to the plan as it is"
    wrongs = {"[1]": "expected settings such as", "{forse: true}": "did you mean 'force'?", "{": "not valid YAML"}
    for wrong, message in wrongs.items():
        refused = invoke(*prune, "--operators", wrong, "--out", tmp_path / "c")
        assert refused.exit_code == 2
        assert message in refused.output


def test_the_help_says_which_stages_an_option_is_for():
    text = " ".join(invoke("prune", "--help").output.split())
    assert "to time (search and operators only)" in text
    assert "e.g. '{}' (search only)" in text


def test_scratch_of_another_command_is_not_taken_up(make_model, text_data, tmp_path, monkeypatch):
    from edgekd.prune import Prune

    found = []

    def die(self, student, ctx):
        found.append([path.name for path in ctx.work.iterdir()])
        (ctx.work / "half-done").write_text(self.criterion)
        raise KeyboardInterrupt

    model = tmp_path / "model"
    shutil.copytree(make_model("bert"), model)

    def run(*settings):
        invoke("prune", model, "--data", text_data, "-q", "--out", tmp_path / "out", *settings)
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Prune, "run", die)
        assert run() == []
        assert run() == ["half-done"], "the same command goes on"
        assert run("--set", "samples=9") == run("--seed", 3) == []
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "changed": True}))
        assert run() == []
    before = set(tmp_path.glob(".out.work-*"))
    assert len(before) == 4
    monkeypatch.setattr(Prune, "run", lambda self, student, ctx: student)
    run("--set", "samples=9")
    assert (tmp_path / "out" / "edgekd-stage.json").is_file()


def test_search_leaves_a_plan_that_prune_follows(make_model, text_data, tmp_path):
    done = invoke(
        "search", make_model("bert"), "--data", text_data, "--speedup", 1.1, "--sequence", 16, "--threads", 1,
        "--set", "checks=0", "--set", "samples=8", "--set", "finalists=0", "--set", "neuron_step=16",
        "--out", tmp_path / "planned", "-q",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "planned" / "config.json").read_text())["edgekd"]["plan"]
    assert (tmp_path / "planned" / "front.svg").read_text().startswith("<svg")
    done = invoke("prune", tmp_path / "planned", "--data", text_data, "--out", tmp_path / "pruned", "-q")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["edgekd"]["arch"] == plan


def test_wrong_stage_settings_are_refused_in_the_same_words(make_model, text_data, tmp_path):
    prune = ["prune", make_model("bert"), "--data", text_data, "--out", tmp_path / "p", "-q"]
    for setting, message in [
        ("criterio=activation", "did you mean 'criterion'?"),
        ("criterion=activations", "did you mean 'activation'?"),
        ("samples", "expected KEY=VALUE"),
        ("heads=[1,2]", "heads has 2 entries, but 3 layers are kept"),
        ("layers=[5]", "layers must be ascending indices below 3"),
    ]:
        done = invoke(*prune, "--set", setting)
        assert done.exit_code == 2, done.output
        assert message in done.output
    assert "no shape to cut to" in invoke(*prune).output
    done = invoke("export", make_model("bert"), "--data", text_data, "--out", tmp_path / "b", "--sequence", 9999)
    assert "sequence is 9999; expected 1 to 32, the most this model takes" in done.output
    assert not list(tmp_path.iterdir())


def test_a_setting_of_finetune_is_given_once_and_suits_the_model(make_model, text_data, tmp_path):
    finetune = ["finetune", make_model("bert"), "--data", text_data, "--out", tmp_path / "t", "-q"]
    for more, message in [
        (["--batch-size", 4, "--set", "batch_size=2"], "batch_size is given twice"),
        (["--augment", "shift"], "augment: shift moves images"),
    ]:
        done = invoke(*finetune, *more)
        assert done.exit_code == 2, done.output
        assert message in done.output
    assert not list(tmp_path.iterdir())


def test_a_stage_does_not_replace_what_it_did_not_make(make_model, text_data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    done = invoke(
        "prune", make_model("bert"), "--data", text_data, "--set", "heads=2", "--out", tmp_path / "mine", "-q"
    )
    assert done.exit_code == 2
    assert "will not replace" in done.output
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_init_writes_a_recipe_that_loads(make_model, text_data, tmp_path):
    file = tmp_path / "recipe.yaml"
    assert invoke("init", file, "--teacher", make_model("bert"), "--data", text_data).exit_code == 0
    assert set(yaml.safe_load(file.read_text())) >= {"teacher", "data", "targets", "budget", "stages"}
    from edgekd.recipe import load_recipe

    assert {"search", "prune", "distill", "quantize"} <= set(load_recipe(file).stages)
    assert "--force" in invoke("init", file).output
