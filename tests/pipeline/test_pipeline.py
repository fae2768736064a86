from __future__ import annotations

import copy
import importlib
import json
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import edgekd
from edgekd.cli import main
from edgekd.context import Budget
from edgekd.data import DataSpec
from edgekd.errors import BudgetError, DataError, ModelError, RecipeError, StageError, StoreError, TargetError
from edgekd.latency.verdict import Verdict
from edgekd.pipeline import compress, evaluate
from edgekd.pipeline.compress import report_again
from edgekd.pipeline.export import export
from edgekd.pipeline.finish import accuracy_floor, exit_code, with_size
from edgekd.pipeline.parity import of_run, parity
from edgekd.pipeline.rounds import overshoot
from edgekd.store import sha256_file
from edgekd.target import load_target, probe, shipped_targets_dir
from edgekd.tasks import get_task


class Lines:
    """A progress that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, description, total):
        pass

    def advance(self, steps=1, **metrics):
        pass

    def stop(self):
        pass

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def bundle(finished):
    return finished.bundles["local"]


def test_the_manifest_has_every_section(finished, bundle):
    manifest = json.loads((bundle / "edgekd.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["task"] == "text-classification"
    assert set(manifest["teacher"]) == {"metric", "value", "n", "p50_ms", "size_bytes"}
    assert manifest["artifact"]["sha256"] == sha256_file(bundle / "onnx" / "model.onnx")
    assert manifest["artifact"]["size_bytes"] == (bundle / "onnx" / "model.onnx").stat().st_size
    assert manifest["artifact"]["precision"] == "int8"
    assert manifest["quality"]["n"] == 40
    assert manifest["quality"]["split"] == "test"
    low, high = manifest["quality"]["ci95"]
    assert low <= manifest["quality"]["value"] <= high
    (latency,) = manifest["latency"]
    assert latency["kind"] == "measured"
    assert latency["p50_ms"] <= latency["p95_ms"] <= latency["p99_ms"]
    assert latency["ci95_ms"][0] <= latency["p50_ms"] <= latency["ci95_ms"][1]
    assert latency["speedup"] == pytest.approx(latency["teacher_p50_ms"] / latency["p50_ms"], rel=1e-3)
    assert [entry["stage"] for entry in manifest["ledger"]] == ["prune", "distill", "quantize"]
    assert all(entry["latency"]["kind"] == "measured" and entry["seconds"] >= 0 for entry in manifest["ledger"])
    assert manifest["seeds"] == {"run": 0}
    assert manifest["recipe"] == json.loads((finished.folder / "manifest.json").read_text())["recipe"]
    assert {"torch", "onnxruntime", "python"} <= set(manifest["versions"])


def test_the_bundle_loads_in_optimum_and_gives_the_same_labels(bundle, text_data):
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    texts = [json.loads(line)["text"] for line in (text_data / "test.jsonl").read_text().splitlines()[:10]]
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ORTModelForSequenceClassification.from_pretrained(bundle)
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
        labels = [classify(text)[0]["label"] for text in texts]
    session = ort.InferenceSession(str(bundle / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    for text, label in zip(texts, labels, strict=True):
        feeds = {k: v for k, v in tokenizer(text, return_tensors="np").items() if k in names}
        assert ("negative", "positive")[int(np.argmax(session.run(None, dict(feeds))[0]))] == label


def test_evaluate_gives_the_figure_of_the_manifest(finished, bundle, text_data):
    seen = evaluate(bundle, DataSpec(path=str(text_data)))
    stated = finished.manifests["local"]["quality"]
    assert (seen["value"], seen["ci95"], seen["n"]) == (stated["value"], stated["ci95"], stated["n"])


def test_what_is_judged_later_reads_texts_as_long_as_the_run_did(make_recipe, text_data, tmp_path, monkeypatch):
    data = {"path": str(text_data), "max_length": 6}
    result = compress(make_recipe(data=data, stages=make_recipe().to_dict()["stages"][:1]), tmp_path / "run")
    bundle = result.bundles["local"]
    assert result.manifests["local"]["max_length"] == 6
    asked = []

    def encode(processor, examples, max_length):
        asked.append(max_length)
        return text.encode(processor, examples, max_length)

    text = get_task("text-classification")
    for name in ("evaluate", "parity"):
        module = importlib.import_module(f"edgekd.pipeline.{name}")
        monkeypatch.setattr(module, "get_task", lambda name: replace(text, encode=encode))
    seen = evaluate(bundle, DataSpec(path=str(text_data)))
    evaluate(bundle, DataSpec(path=str(text_data)), max_length=7)
    parity(tmp_path / "run" / "01-prune", bundle, DataSpec(path=str(text_data)))
    assert asked == [6, 7, 6]
    assert seen["value"] == result.manifests["local"]["quality"]["value"]


def test_every_stage_can_be_loaded_and_is_as_small_as_planned(finished):
    pruned = edgekd.load(finished.folder / "01-prune")
    assert pruned.arch.describe() == "2 layers of 32: heads 2/2, neurons 40/24"
    assert edgekd.load(finished.folder / "02-distill").arch == pruned.arch
    assert edgekd.load(finished.folder / "03-quantize").quantization == {"lowering": "int8_dynamic"}


def test_running_again_does_nothing_and_says_so(finished, make_recipe):
    before = (finished.folder / "bundle" / "edgekd.json").stat().st_mtime_ns
    lines = Lines()
    again = compress(make_recipe(), finished.folder, progress=lines)
    assert "is finished; nothing to do" in lines.said[-1]
    assert again.manifests == {"local": json.loads((again.bundles["local"] / "edgekd.json").read_text())}
    assert (finished.folder / "bundle" / "edgekd.json").stat().st_mtime_ns == before


def test_a_run_of_so_many_threads_is_taken_up_where_the_process_may_use_other_cores(finished, make_recipe, monkeypatch):
    monkeypatch.setattr("edgekd.host.usable_cores", lambda *_: 7)
    lines = Lines()
    compress(make_recipe(), finished.folder, progress=lines)
    assert "is finished; nothing to do" in lines.said[-1]


def test_a_changed_setting_runs_only_what_depends_on_it(finished, make_recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    stages = [*make_recipe().to_dict()["stages"][:2], {"quantize": {"lowering": "int8_static", "force": True}}]
    lines = Lines()
    result = compress(make_recipe(stages=stages), run, progress=lines)
    assert "prune: done before, taken from 01-prune" in lines.said
    assert "distill: done before, taken from 02-distill" in lines.said
    assert "quantize: local" in lines.said
    assert result.manifests["local"]["artifact"]["lowering"] == "int8_static"


def test_a_damaged_stage_is_run_again(finished, make_recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    (run / "manifest.json").unlink()
    (run / "03-quantize" / "config.json").write_text("{}")
    lines = Lines()
    result = compress(make_recipe(), run, progress=lines)
    assert any("config.json is not as the stage left it" in line for line in lines.said)
    assert result.manifests["local"]["artifact"]["sha256"] == finished.manifests["local"]["artifact"]["sha256"]


def test_two_targets_give_two_bundles_and_two_verdicts(make_recipe, tmp_path):
    other = tmp_path / "other.yaml"
    shutil.copyfile(shipped_targets_dir() / "local.yaml", other)
    result = compress(
        make_recipe(targets=["local", str(other)], stages=make_recipe().to_dict()["stages"][:1]), tmp_path / "r"
    )
    assert {path.name for path in result.bundles.values()} == {"bundle-local", "bundle-other"}
    assert [verdict.target for verdict in result.verdicts] == ["local", "other"]


def test_a_budget_that_is_missed_is_reported_with_a_bundle_and_code_3(make_recipe, tmp_path):
    result = compress(make_recipe(budget={"speedup": 1000, "sequence": 16, "threads": 1}), tmp_path / "run")
    assert result.exit_code == 3
    assert result.verdicts[0].status == "fail"
    assert "misses the budget of 1000×" in result.verdicts[0].reason
    assert len(result.manifests["local"]["rounds"]) == 1, "another round cannot help without search"
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_missed_accuracy_floor_gives_code_4(make_recipe, tmp_path):
    budget = {"size_mb": 100, "min_accuracy": 1.0, "sequence": 16}
    result = compress(make_recipe(budget=budget, stages=make_recipe().to_dict()["stages"][:1]), tmp_path / "run")
    assert result.exit_code == 4
    assert result.manifests["local"]["accuracy_floor_met"] is False


def test_a_missed_latency_leads_to_a_tighter_round_with_the_same_supernet(make_recipe, tmp_path, monkeypatch):
    seen, trained = [], []

    def train(self, student, ctx):
        trained.append(ctx.strictness)
        model = copy.deepcopy(student.model)
        model.classifier.bias.data += 1.0
        return replace(student, model=model)

    def plan(settings, student, ctx):
        seen.append((ctx.strictness, float(student.model.classifier.bias.data.mean())))
        return replace(student, plan=student.arch)

    monkeypatch.setattr("edgekd.supernet.Supernet.run", train)
    monkeypatch.setattr("edgekd.search.strategy.choose", plan)
    stages = [{"supernet": {}}, {"search": {}}, {"prune": {"samples": 8}}]
    budget = {"speedup": 50, "sequence": 16, "threads": 1, "max_rounds": 2}
    result = compress(make_recipe(stages=stages, budget=budget), tmp_path / "run")
    assert trained == [1.0]
    assert len(seen) == 2
    assert seen[0][0] == 1.0
    assert seen[1][0] < 0.1
    assert seen[0][1] == seen[1][1] > 0.5, "both rounds start from the supernet's weights"
    assert [entry["round"] for entry in result.manifests["local"]["rounds"]] == [1, 2]
    assert (tmp_path / "run" / "02-search-round2").is_dir()
    assert not (tmp_path / "run" / "01-supernet-round2").exists()
    prune = result.manifests["local"]["ledger"][-1]
    assert "kept" not in prune, "cutting nothing away changes nothing"
    assert prune["latency"]["reason"] == "the stage changes no weights"


def test_a_budget_out_of_reach_leaves_a_verdict_and_no_bundle(make_recipe, tmp_path, monkeypatch):
    def refuse(settings, student, ctx):
        raise BudgetError("out of reach; the nearest point is 3×")

    monkeypatch.setattr("edgekd.search.strategy.choose", refuse)
    result = compress(make_recipe(stages=[{"search": {}}, {"prune": {}}]), tmp_path / "run")
    assert result.exit_code == 3
    assert result.verdicts == (Verdict("local", "fail", "out of reach; the nearest point is 3×"),)
    assert not list(tmp_path.glob("run/bundle*"))


def two_rounds(monkeypatch, make_recipe, trouble=BudgetError):
    """A recipe whose search finds a shape in the first round, and none in the second."""
    calls = []

    def plan(settings, student, ctx):
        calls.append(ctx.strictness)
        if len(calls) > 1:
            raise trouble("out of reach inside; the nearest point is 3×")
        return replace(student, plan=student.arch)

    monkeypatch.setattr("edgekd.search.strategy.choose", plan)
    budget = {"speedup": 50, "sequence": 16, "threads": 1, "max_rounds": 3}
    return make_recipe(stages=[{"search": {}}, {"prune": {"samples": 8}}], budget=budget)


@pytest.mark.parametrize("trouble", [BudgetError, TargetError], ids=["no shape", "the compiler refuses one"])
def test_a_later_round_without_result_leaves_what_the_round_before_made(make_recipe, tmp_path, monkeypatch, trouble):
    result = compress(two_rounds(monkeypatch, make_recipe, trouble), tmp_path / "run")
    manifest = result.manifests["local"]
    assert (result.bundles["local"] / "onnx" / "model.onnx").is_file()
    assert result.exit_code == 3
    assert "misses the budget of 50×" in manifest["verdict"][0]["reason"]
    first, second = manifest["rounds"]
    assert (first["round"], first["strictness"]) == (1, 1.0)
    assert (second["round"], second["status"]) == (2, "fail")
    assert second["reason"].startswith("out of reach inside")
    assert second["strictness"] < 0.1
    assert [entry["folder"] for entry in manifest["ledger"]] == ["01-search", "02-prune"]


@pytest.mark.parametrize("later", ["a shape", "no shape"])
def test_a_run_that_was_killed_in_a_later_round_does_not_measure_the_first_again(
    make_recipe, tmp_path, monkeypatch, later
):
    """Measured again, the first round would ask the second for another strictness, and what it had would be lost."""
    asked, judged = [], []

    class Killed(BaseException):
        pass

    def plan(settings, student, ctx):
        asked.append(ctx.strictness)
        if len(asked) == 2:
            (ctx.work / "half").write_text("done")
            raise Killed
        if len(asked) == 3:
            assert (ctx.work / "half").is_file(), "what the killed process had done"
            if later == "no shape":
                raise BudgetError("out of reach inside")
        return replace(student, plan=student.arch)

    def judge(travelled, *args):
        judged.append(travelled.key)
        return real(travelled, *args)

    module = importlib.import_module("edgekd.pipeline.compress")
    real = module.judge
    monkeypatch.setattr(module, "judge", judge)
    monkeypatch.setattr("edgekd.search.strategy.choose", plan)
    budget = {"speedup": 50, "sequence": 16, "threads": 1, "max_rounds": 2}
    recipe = make_recipe(stages=[{"search": {}}, {"prune": {"samples": 8}}], budget=budget)
    with pytest.raises(Killed):
        compress(recipe, tmp_path / "run")
    assert (len(asked), len(judged)) == (2, 1)
    result = compress(recipe, tmp_path / "run")
    assert asked[2] == asked[1] < asked[0]
    rounds = result.manifests["local"]["rounds"]
    assert [entry["strictness"] for entry in rounds] == [1.0, asked[1]]
    assert len(judged) == 2
    assert (judged[1] == judged[0]) == (later == "no shape"), "only then the first is what ships"


@pytest.mark.parametrize(
    ("status", "budget", "expected"),
    [
        ("pass", {"speedup": 4.0, "size_mb": 0.001}, None),
        ("inconclusive", {"speedup": 4.0}, 4 / 3.9),
        ("fail", {"speedup": 4.0}, 4 / 3.9),
        ("fail", {"latency_p95_ms": 2.0}, 1.25),
        ("fail", {"size_mb": 0.001}, None),
    ],
)
def test_another_round_is_for_a_latency_that_is_missed(status, budget, expected):
    """A size that is missed is no reason: search does not look at it."""
    found = SimpleNamespace(
        gauged=SimpleNamespace(verdict=Verdict("local", status, "")),
        verdict=Verdict("local", "fail", ""),
        measurement=SimpleNamespace(speedup=3.9, p95_ms=2.5),
    )
    assert overshoot(found, Budget(**budget)) == expected


def test_bundles_of_an_earlier_recipe_do_not_stay_beside_a_verdict_without_one(
    finished, make_recipe, tmp_path, monkeypatch
):
    def refuse(settings, student, ctx):
        raise BudgetError("out of reach")

    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    for name in ("bundle-local", "bundle-mine", "bundles"):
        shutil.copytree(finished.folder / "bundle", run / name)
    (run / "bundle-local" / "sub").mkdir()
    (run / "bundle-notes").mkdir()
    (run / "bundle.txt").write_text("mine")
    outside = tmp_path / "elsewhere"
    shutil.copytree(finished.folder / "bundle", outside)
    monkeypatch.setattr("edgekd.search.strategy.choose", refuse)
    lines = Lines()
    result = compress(make_recipe(stages=[{"search": {}}, {"prune": {}}]), run, progress=lines)
    assert (result.exit_code, dict(result.bundles)) == (3, {})
    assert sorted(path.name for path in run.glob("*bundle*")) == [
        "bundle-mine",
        "bundle-notes",
        "bundle.txt",
        "bundles",
    ]
    assert not list(run.glob(".bundle*"))
    assert "bundle: of an earlier recipe, removed" in lines.said
    assert (outside / "edgekd.json").is_file()


def test_a_link_named_like_a_bundle_is_left_alone(finished, make_recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    (run / "bundle-local").symlink_to(finished.folder / "bundle")
    (run / "manifest.json").unlink()
    compress(make_recipe(), run)
    assert (run / "bundle-local").is_symlink()
    assert (run / "bundle" / "edgekd.json").is_file()
    assert (finished.folder / "bundle" / "edgekd.json").is_file()


def test_data_without_labels_is_labelled_by_the_teacher(make_recipe, text_data, tmp_path):
    data = tmp_path / "texts"
    data.mkdir()
    rows = [json.loads(line)["text"] for line in (text_data / "train.jsonl").read_text().splitlines()]
    (data / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    result = compress(
        make_recipe(data={"path": str(data)}, stages=make_recipe().to_dict()["stages"][:1]), tmp_path / "run"
    )
    quality = result.manifests["local"]["quality"]
    assert (quality["metric"], quality["split"]) == ("agreement", "validation")
    assert result.manifests["local"]["teacher"]["value"] == 1.0


def test_an_accuracy_that_cannot_be_measured_cannot_be_asked_for(make_recipe, text_data, tmp_path):
    rows = [json.loads(line)["text"] for line in (text_data / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    recipe = make_recipe(data={"path": str(tmp_path / "train.jsonl")}, budget={"size_mb": 100, "min_accuracy": 0.5})
    with pytest.raises(RecipeError, match="budget.min_accuracy is 0.5, and the data has no labels"):
        compress(recipe, tmp_path / "run")


@pytest.mark.parametrize("kind", ["sparse", "quantized", "boosted"])
def test_what_edgekd_made_can_teach(make_recipe, make_model, text_data, tmp_path, kind):
    """It is its weights: the baseline is their float32 graph, and zeros are not to be kept."""
    folder = tmp_path / "made"
    stage, *given = {
        "sparse": ("sparsify", "pattern=2:4", "epochs=0", "calibration=16"),
        "boosted": ("sparsify", "pattern=2:4", "epochs=0", "calibration=16", "boost=8"),
        "quantized": ("quantize", "lowering=int8_dynamic"),
    }[kind]
    settings = [word for setting in given for word in ("--set", setting)]
    done = CliRunner().invoke(
        main, [stage, str(make_model("bert")), "--data", str(text_data), "--out", str(folder), *settings]
    )
    assert done.exit_code == 0, done.output
    stages = [{"distill": {"epochs": 1, "batch_size": 32, "precision": "fp32"}}]
    run = tmp_path / "run"
    result = compress(make_recipe(teacher=str(folder), stages=stages), run)
    manifest = result.manifests["local"]
    assert manifest["artifact"]["precision"] == "fp32"
    nodes = onnx.load(run / "00-teacher" / "model.onnx").graph.node
    assert not any("Integer" in node.op_type for node in nodes)
    assert "sparsity" not in manifest["artifact"]


def test_a_stage_that_breaks_a_promise_is_stopped(make_recipe, tmp_path, monkeypatch):
    def spoil(settings, student, ctx):
        for parameter in student.model.parameters():
            parameter.data.fill_(float("nan"))
        return student

    monkeypatch.setattr("edgekd.distill.recover.recover", spoil)
    with pytest.raises(StageError, match="not finite"):
        compress(make_recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / "02-distill").exists()
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_reports_are_written_again_only_for_finished_runs(finished, tmp_path):
    page = finished.folder / "report.html"
    first = page.read_text()
    page.unlink()
    assert report_again(finished.folder).exit_code == finished.exit_code
    assert page.read_text() == first
    assert "http://" not in first.replace("http://www.w3.org", "")
    with pytest.raises(StoreError, match="is not a finished run"):
        report_again(tmp_path)


def test_the_last_student_of_a_run_is_found_by_its_bundle(finished):
    assert of_run(finished.folder) == (finished.folder / "03-quantize", finished.bundles["local"])


def test_export_of_a_stage_folder_gives_the_same_artifact(finished, text_data, tmp_path):
    target, budget = probe(load_target("local")), edgekd.context.Budget(sequence=16, threads=1)
    student = finished.folder / "03-quantize"
    manifest = export(student, tmp_path / "b", target=target, budget=budget, data=DataSpec(path=str(text_data)))
    assert manifest["artifact"]["sha256"] == finished.manifests["local"]["artifact"]["sha256"]
    assert manifest["quality"]["value"] == finished.manifests["local"]["quality"]["value"]
    without = export(student, tmp_path / "c", target=target, budget=budget)
    assert without["quality"] is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(StoreError, match="it is not a bundle"):
        export(student, tmp_path / "mine", target=target, budget=budget)
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_evaluate_says_how_many_examples_do_not_count(bundle, tmp_path):
    rows = [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}, {"text": "who knows"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(main, ["evaluate", str(bundle), "--data", str(file)])
    assert done.exit_code == 0, done.output
    assert "n=2" in done.output
    assert "1 without a label do not count" in done.output


def test_evaluate_refuses_what_is_not_a_whole_bundle(bundle, text_data, tmp_path):
    with pytest.raises(ModelError, match="is not a bundle"):
        evaluate(tmp_path, DataSpec(path=str(text_data)))
    with pytest.raises(DataError):
        evaluate(bundle, DataSpec(path=str(tmp_path / "nowhere.jsonl")))


def test_floors_sizes_and_exit_codes(finished):
    class Base:
        reported = 0.9

    budget = edgekd.context.Budget
    assert accuracy_floor(Base, budget(accuracy_drop=0.02)) == pytest.approx(0.88)
    assert accuracy_floor(Base, budget(min_accuracy=0.5)) == 0.5
    assert accuracy_floor(Base, budget()) == float("-inf")
    verdict = Verdict("local", "pass", "fine")
    assert with_size(verdict, 2_000_000, budget(size_mb=1)).status == "fail"
    assert with_size(verdict, 900_000, budget(size_mb=1)).status == "pass"
    assert with_size(verdict, 900_000, budget()) == verdict

    class Judged:
        def __init__(self, status, met=True):
            self.verdict, self.accuracy_met = Verdict("t", status, ""), met

    cases = [(["pass"], 0), (["fail", "pass"], 3), (["inconclusive"], 5), (["pass", "inconclusive", "fail"], 3)]
    for statuses, code in cases:
        assert exit_code([Judged(status) for status in statuses]) == code
    assert exit_code([Judged("inconclusive", met=False)]) == 4
