"""A supernet is trained once and shared by targets, rounds and budgets; operators to come are foreseen."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import ClassVar

import pytest

from edgekd.arch import Arch
from edgekd.context import Budget, as_it_is
from edgekd.errors import ModelError
from edgekd.operators import Operators
from edgekd.pipeline import compress
from edgekd.pipeline.compress import _run_key
from edgekd.pipeline.keys import stage_key, target_key
from edgekd.prune import Prune
from edgekd.report.gains import shared
from edgekd.search import Search
from edgekd.stages import STAGES, build_stage
from edgekd.supernet import Supernet
from edgekd.target import load_target, probe, shipped_targets_dir

STEPS = [{"supernet": {}}, {"prune": {"layers": [0, 2], "heads": 2, "neurons": 40, "samples": 8}}]
BUDGET = {"size_mb": 100, "sequence": 8}


@pytest.fixture
def trained(monkeypatch):
    """The contexts in which a cheap supernet stage was run."""
    seen = []

    def run(self, student, ctx):
        seen.append(ctx)
        model = copy.deepcopy(student.model)
        model.classifier.bias.data += 1.0
        return replace(student, model=model)

    monkeypatch.setattr(Supernet, "run", run)
    return seen


def test_three_targets_train_one_supernet(make_recipe, trained, tmp_path):
    targets = ["gpu-cuda", "gpu-jetson-orin", str(tmp_path / "other.yaml")]
    (tmp_path / "other.yaml").write_bytes((shipped_targets_dir() / "gpu-cuda.yaml").read_bytes())
    result = compress(make_recipe(targets=targets, stages=STEPS, budget=BUDGET), tmp_path / "run")
    assert len(trained) == 1
    names = sorted(path.name for path in (tmp_path / "run").glob("0[12]-*"))
    assert names == ["01-supernet", "02-prune-gpu-cuda", "02-prune-gpu-jetson-orin", "02-prune-other"]
    ledgers = [manifest["ledger"] for manifest in result.manifests.values()]
    assert len(ledgers) == 3
    first = ledgers[0][0]
    assert all(ledger[0] == first for ledger in ledgers)
    assert (first["stage"], first["shared"], first["folder"]) == ("supernet", True, "01-supernet")
    assert first["seconds"] >= 0
    assert first["metric"] is not None
    assert first["latency"]["kind"] == "unavailable"
    assert "kept" not in first
    assert "shared" not in ledgers[0][1]
    [line] = shared(result.manifests["gpu-cuda"], 3)
    assert line.endswith("shared by 3 targets")
    assert line in (tmp_path / "run" / "report.html").read_text()


def test_a_shared_stage_sees_neither_target_nor_budget(make_recipe, trained, tmp_path):
    recipe = make_recipe(targets=["gpu-jetson-orin"], stages=STEPS, budget=BUDGET)
    compress(recipe, tmp_path / "run")
    [ctx] = trained
    assert (ctx.target.name, ctx.budget, ctx.strictness, ctx.lowering) == ("local", Budget(), 1.0, "fp32")
    assert int(ctx.train.lengths.max()) > 8, "texts are not cut to the shapes of one target"
    budget = {"size_mb": 90, "sequence": 12}
    compress(make_recipe(targets=["gpu-cuda"], stages=STEPS, budget=budget), tmp_path / "run")
    assert len(trained) == 1, "another target and budget take up the same supernet"
    compress(make_recipe(targets=["gpu-cuda"], stages=STEPS, budget=budget, seed=1), tmp_path / "run")
    assert len(trained) == 2, "another seed does not"


STAGE_LIST = {"supernet": Supernet(), "search": Search(), "prune": Prune(), "operators": Operators()}


def key(name, *, stages=STAGE_LIST, previous="root", strictness=1.0, lowering="fp32"):
    return stage_key(previous, name, stages, strictness=strictness, lowering=lowering)


def test_keys_hang_on_what_matters_and_on_nothing_else():
    assert key("supernet") == key("supernet", strictness=0.5, lowering="int8_dynamic")
    assert key("prune") == key("prune", strictness=0.5, lowering="int8_dynamic")
    assert key("search") != key("search", strictness=0.5)
    for name in ("search", "operators"):
        assert key(name) != key(name, lowering="int8_dynamic"), f"{name} times what is to ship"
    assert key("operators") == key("operators", strictness=0.5)
    assert len({key(name) for name in STAGE_LIST}) == len(STAGE_LIST)
    other = {**STAGE_LIST, "operators": Operators(force=True)}
    without = {name: stage for name, stage in STAGE_LIST.items() if name != "operators"}
    assert len({key("search"), key("search", stages=other), key("search", stages=without)}) == 3
    for name in ("supernet", "prune"):
        assert key(name) == key(name, stages=other) == key(name, stages=without), f"{name} knows of no operators"
    distill = {"distill": STAGES["distill"](checkpoint_steps=5), "operators": Operators()}
    assert key("distill", stages=distill) == key("distill", stages={"distill": STAGES["distill"]()})


def test_what_the_settings_of_search_name_is_in_its_key(tmp_path, make_recipe):
    table, model = tmp_path / "table.json", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    stages = {"search": Search(table=str(table), init=[str(model)]), "prune": Prune()}

    class Setup:
        key: ClassVar[dict[str, str]] = {"teacher": "t", "data": "d"}

    recipe = replace(make_recipe(), stages=stages)

    def keys():
        return key("search", stages=stages), _run_key(recipe, Setup, [])

    seen = [keys()]
    table.write_text("one")
    seen.append(keys())
    table.write_text("two")
    seen.append(keys())
    (model / "config.json").write_text('{"other": 1}')
    seen.append(keys())
    assert seen[-1] == keys()
    for each in zip(*seen, strict=True):
        assert len(set(each)) == 4
    assert key("prune", stages=stages) == key("prune", stages={"prune": Prune()})
    with pytest.raises(ModelError, match="no model folder"):
        key("search", stages={"search": Search(init=[str(tmp_path / "gone")])})


def test_targets_part_after_what_they_share():
    class Setup:
        key: ClassVar[dict[str, str]] = {"teacher": "t", "data": "d"}

    local, cuda = probe(load_target("local")), probe(load_target("gpu-cuda"))
    keys = {
        target_key("root", Setup, local, Budget()),
        target_key("root", Setup, cuda, Budget()),
        target_key("root", Setup, local, Budget(batch=2)),
        target_key("other", Setup, local, Budget()),
    }
    assert len(keys) == 4


def test_search_alone_foresees_operators(make_recipe, monkeypatch, tmp_path):
    seen = {}

    def keep(name):
        def run(self, student, ctx):
            seen[name] = ctx.reshape
            return student

        return run

    for name in ("supernet", "search", "prune", "operators", "distill"):
        monkeypatch.setattr(STAGES[name], "run", keep(name))
    marked = Arch(family="bert", hidden=1, head_dim=1, vocabulary=1, layers=())
    monkeypatch.setattr(Operators, "reshape", lambda self, arch: marked)
    stages = [{name: {}} for name in ("supernet", "search", "prune", "operators", "distill")]
    compress(make_recipe(targets=["gpu-cuda"], stages=stages, budget=BUDGET), tmp_path / "run")
    other = replace(marked, hidden=2)
    assert seen.pop("search")(other) == marked
    assert len(seen) == 4
    assert all(reshape is as_it_is for reshape in seen.values())
    assert build_stage("operators", {}).reshape(other) == marked
