"""A stage that gains nothing is rolled back; the ledger says what was seen and why."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import edgekd
from edgekd.context import Budget, Silent
from edgekd.data import DataSpec
from edgekd.errors import ModelError, StageError
from edgekd.export import parity
from edgekd.latency.stats import Samples
from edgekd.pipeline import compress, prepare, sides, stages
from edgekd.pipeline.guard import JUDGES, Decision, decide, guard
from edgekd.pipeline.sides import Scale, Side, divergence, weigh
from edgekd.quantize import Quantize
from edgekd.stages import STAGES
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target, probe

PRUNE = {"prune": {"layers": [0, 2], "heads": 2, "neurons": [40, 24], "samples": 32}}
DOCS = Path(__file__).parents[2] / "docs"


def side(ms=2.0, ratio=None, interval=None, size=1_000_000, metric=0.9, kl=0.1, kind="measured", reason=None):
    latency = {"kind": "unavailable", "reason": reason} if reason else {"kind": kind, "p50_ms": ms}
    latency |= {} if ratio is None else {"ratio": ratio}
    latency |= {} if interval is None else {"ratio_ci99": interval}
    return Side(
        shape="s", lowering="fp32", precision="fp32", latency=latency, size_bytes=size, metric=metric, divergence=kl
    )


FASTER = side(ratio=0.5, interval=[0.49, 0.51])
LATENCY = [
    (side(ratio=0.5, interval=[0.49, 0.51]), True),
    (side(ratio=0.9, interval=[0.8, 1.0]), False),
    (side(ratio=1.2, interval=[1.1, 1.3]), False),
    (side(ratio=0.99, kind="vendor_estimate"), True),
    (side(ratio=1.0, kind="vendor_estimate"), False),
]


@pytest.mark.parametrize(("after", "kept"), LATENCY)
def test_latency_counts_when_the_whole_interval_is_below_one(after, kept):
    decision = decide(("latency",), side(4.0), after)
    assert (decision.kept, decision.forced) == (kept, False)
    assert "latency 4 → 2 ms" in decision.why
    assert decision.why.startswith("rolled back because nothing was gained") != kept


@pytest.mark.parametrize(("size", "kept"), [(990_000, True), (990_001, False), (1_500_000, False)])
def test_size_counts_from_one_percent_on(size, kept):
    assert decide(("size",), side(), side(size=size)).kept == kept


@pytest.mark.parametrize(
    ("metric", "kl", "kept"),
    [(0.91, 0.5, True), (0.9, 0.09, True), (0.9, 0.1, False), (0.9, 0.2, False), (0.89, 0.01, False)],
)
def test_the_metric_counts_when_higher_or_equal_and_nearer_to_the_teacher(metric, kl, kept):
    assert decide(("metric",), side(), side(metric=metric, kl=kl)).kept == kept


def test_one_gain_is_enough_and_losses_elsewhere_are_told():
    slower_but_smaller = side(3.0, ratio=1.5, interval=[1.4, 1.6], size=250_000)
    decision = decide(("latency", "size"), side(2.0), slower_but_smaller)
    assert decision.kept
    assert "ratio 1.500 (99 % interval 1.400–1.600)" in decision.why
    assert "size 1.00 → 0.25 MB (-75.0%)" in decision.why


def test_force_keeps_what_gains_nothing_and_is_not_blamed_for_what_does():
    worse = side(3.0, ratio=1.5, interval=[1.4, 1.6])
    assert decide(("latency", "size"), side(), worse, force=True) == Decision(
        kept=True,
        forced=True,
        why="kept because of force, though nothing was gained: latency 2 → 3 ms, ratio 1.500 "
        "(99 % interval 1.400–1.600); size 1.00 → 1.00 MB (+0.0%)",
    )
    assert not decide(("latency",), side(), FASTER, force=True).forced


def test_what_cannot_be_measured_does_not_count_against_a_stage():
    there = side(reason="no such board")
    decision = decide(("latency",), there, there)
    assert decision.kept
    assert decision.why == "kept though no gain is known: latency could not be measured (no such board)"
    assert decide(("latency", "size"), there, side(reason="no such board", size=500_000)).why.endswith("MB (-50.0%)")
    assert decide(("metric",), side(metric=None), side()).kept


def test_what_a_stage_buys_can_be_judged_and_is_what_the_docs_say():
    table = dict(re.findall(r"^\| `(\w+)` \| [^|]*\| ([a-z ]*)\|$", (DOCS / "recipe.md").read_text(), re.MULTILINE))
    for name, stage in STAGES.items():
        assert set(stage.buys) <= set(JUDGES)
        assert table[name].strip() == " or ".join(stage.buys), name


def test_divergence_is_that_of_kullback_and_leibler():
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    expected = float((p * np.log(p / q)).sum())
    assert divergence(np.log([p, q]) + 7, np.log([q, q])) == pytest.approx(expected / 2)
    assert divergence(np.log([p]), np.log([p])) == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def setup(make_model, text_data):
    return prepare(make_model("bert"), DataSpec(path=str(text_data)), progress=Silent())


@pytest.fixture(scope="module")
def pruned(setup):
    from edgekd.prune.plan import plan_from_settings

    plan = plan_from_settings(setup.teacher.arch, [0, 2], 2, 32)
    return cut(setup.teacher, plan, measure_importance(setup.teacher, sample_batches(setup.train, 8, seed=0)))


def scale(setup, target="local", **budget):
    place = probe(load_target(target))
    return Scale(setup=setup, target=place, budget=Budget(sequence=12, **budget), teacher_graph=Path("teacher.onnx"))


def pretend(monkeypatch, medians, *later):
    """Replace the clock: median of each file by a part of its path, in the first run and in later ones."""
    asked, looks = [], [medians, *later]

    def timed(files, target, budget, settings=None):
        medians = looks[min(len(asked), len(looks) - 1)]
        asked.append([str(file) for file in files])
        taken = []
        for file in map(str, files):
            median = next(value for part, value in medians.items() if part in file)
            ms = median * (1 + 0.01 * np.sin(np.arange(240)))
            taken.append(Samples(name=file, ms=ms, block=np.repeat(np.arange(40), 6)))
        return taken

    monkeypatch.setattr(sides, "timed", timed)
    return asked


MEDIANS = {"teacher": 8.0, "before/fp32_fused": 4.0, "before/fp32": 5.0, "after/fp32_fused": 3.0, "after/fp32": 2.0}


def test_both_sides_and_the_teacher_take_turns_and_the_fastest_form_of_each_counts(
    setup, pruned, monkeypatch, tmp_path
):
    asked = pretend(monkeypatch, MEDIANS)
    before, after = weigh(scale(setup), setup.teacher, pruned, tmp_path)
    assert len(asked) == 1, "one run"
    assert len(asked[0]) == 5
    assert (before.lowering, after.lowering) == ("fp32_fused", "fp32")
    assert before.latency["p50_ms"] == pytest.approx(4, rel=1e-2)
    assert after.latency["speedup"] == pytest.approx(4, rel=1e-2)
    assert after.latency["ratio"] == pytest.approx(0.5, rel=1e-2)
    low, high = after.latency["ratio_ci99"]
    assert low <= after.latency["ratio"] <= high < 1
    assert "ratio" not in before.latency
    assert after.size_bytes < before.size_bytes
    assert before.metric_ci95[0] <= before.metric <= before.metric_ci95[1]
    assert before.divergence == pytest.approx(0, abs=1e-9)
    assert after.divergence > 1e-7


@pytest.mark.parametrize(("second", "gained"), [(3.9, True), (4.02, False)])
def test_a_small_gain_must_show_in_a_second_process_too(setup, pruned, monkeypatch, tmp_path, second, gained):
    slow = {"fp32/": 9.0, "teacher": 8.0, "before": 4.0}
    asked = pretend(monkeypatch, {**slow, "after": 3.92}, {**slow, "after": second})
    _, after = weigh(scale(setup), setup.teacher, pruned, tmp_path)
    assert [len(files) for files in asked] == [5, 3], "the second run has the chosen forms only"
    low, high = after.latency["ratio_ci99"]
    assert low <= min(3.92, second) / 4 + 1e-3
    assert high >= max(3.92, second) / 4 - 1e-3
    assert after.latency["n"] == 480
    assert (high < 1) == gained


def test_the_same_bytes_take_the_same_time(setup, pruned, monkeypatch, tmp_path):
    pretend(monkeypatch, {"fp32/": 9.0, "teacher": 8.0, "before": 4.0, "after": 3.0})
    _, after = weigh(scale(setup), pruned, pruned, tmp_path)
    assert (after.latency["ratio"], after.latency["ratio_ci99"]) == (1.0, [1.0, 1.0])


def test_what_was_after_one_stage_is_not_evaluated_again_before_the_next(setup, pruned, monkeypatch, tmp_path):
    pretend(monkeypatch, {"": 1.0})
    scored, whole = [], sides.form_logits
    monkeypatch.setattr(sides, "form_logits", lambda *arguments: scored.append(1) or whole(*arguments))
    shared = scale(setup)
    weigh(shared, setup.teacher, pruned, tmp_path / "1")
    weigh(shared, pruned, pruned, tmp_path / "2")
    assert len(scored) == 2


def refusing(monkeypatch, layers, error):
    """Let students of so many layers not be built."""
    whole = sides.build

    def build(student, *arguments, **keywords):
        if len(student.arch.layers) == layers:
            raise error
        return whole(student, *arguments, **keywords)

    monkeypatch.setattr(sides, "build", build)


def test_a_student_that_the_target_could_not_run_before_is_no_reason_to_stop(setup, pruned, monkeypatch, tmp_path):
    refusing(monkeypatch, 3, ModelError("the target does not run Erf"))
    pretend(monkeypatch, MEDIANS)
    before, after, decision = guard(scale(setup), STAGES["prune"](), setup.teacher, pruned, tmp_path)
    assert before.latency == {"kind": "unavailable", "reason": "the target does not run Erf"}
    assert before.metric is before.size_bytes is None
    assert before.to_dict()["problem"] == "the target does not run Erf"
    assert after.latency["p50_ms"] == pytest.approx(2, rel=1e-2)
    assert "problem" not in after.to_dict()
    assert decision.kept
    assert "latency could not be measured (the target does not run Erf)" in decision.why


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_made_any_more_is_rolled_back(setup, pruned, monkeypatch, tmp_path, force):
    refusing(monkeypatch, 2, ModelError("the target does not run TopK"))
    pretend(monkeypatch, MEDIANS)
    stage = STAGES["operators"](force=force)
    _, after, decision = guard(scale(setup), stage, setup.teacher, pruned, tmp_path)
    assert after.problem == "the target does not run TopK"
    assert (decision.kept, decision.forced) == (force, force)
    assert "it cannot be made for the target: the target does not run TopK" in decision.why


def test_a_float_graph_that_says_something_else_is_a_mistake_of_ours(setup, pruned, monkeypatch, tmp_path):
    refusing(monkeypatch, 2, StageError("the fp32 graph differs"))
    with pytest.raises(StageError, match="the fp32 graph differs"):
        weigh(scale(setup), setup.teacher, pruned, tmp_path / "a")
    refusing(monkeypatch, 3, StageError("the fp16 graph cannot be written"))
    assert weigh(scale(setup, "gpu-cuda"), pruned, setup.teacher, tmp_path / "b")[1].problem.startswith("the fp16")


def test_an_untrained_student_is_not_held_to_what_low_precision_must_agree_on(setup, pruned, monkeypatch, tmp_path):
    monkeypatch.setitem(parity.AGREEMENT, "fp16", 1.1)
    _, after = weigh(scale(setup, "gpu-cuda"), setup.teacher, pruned, tmp_path / "a")
    assert (after.problem, after.precision) == ("", "fp16")
    assert after.metric is not None
    ready = stages.Student(
        model=pruned.model, arch=pruned.arch, processor_dir=pruned.processor_dir, quantization={"lowering": "fp16"}
    )
    assert "are needed" in weigh(scale(setup, "gpu-cuda"), setup.teacher, ready, tmp_path / "b")[1].problem


def test_on_a_target_without_float_form_the_first_quantization_stays(setup, pruned, monkeypatch, tmp_path):
    weighed = side(), side(3.0, ratio=1.5, interval=[1.4, 1.6])
    monkeypatch.setattr("edgekd.pipeline.guard.weigh", lambda *arguments: weighed)
    quantized = stages.Student(model=pruned.model, arch=pruned.arch, quantization={"lowering": "int8_qdq"})
    npu = scale(setup, "npu-qualcomm-qcs9100")
    *_, decision = guard(npu, Quantize(), pruned, quantized, tmp_path)
    assert decision.kept
    assert "runs no float form" in decision.why
    assert not guard(scale(setup), Quantize(), pruned, quantized, tmp_path)[-1].kept
    assert not guard(npu, Quantize(), quantized, quantized, tmp_path)[-1].kept
    assert guard(npu, STAGES["search"](), pruned, quantized, tmp_path)[-1] is None


class Lines:
    """A progress that remembers what was said."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def start(self, description, total): ...

    def advance(self, steps=1, **metrics): ...

    def stop(self): ...


@pytest.fixture(scope="module")
def rolled_back(make_recipe, tmp_path_factory):
    """A real run whose int8 form is slower and larger than float, and what was said on the way."""
    lines, run = Lines(), tmp_path_factory.mktemp("rolled") / "run"
    recipe = make_recipe(stages=[PRUNE, {"quantize": {"lowering": "int8_dynamic"}}])
    return compress(recipe, run, progress=lines), lines.said


def test_a_form_that_gains_nothing_is_rolled_back(rolled_back):
    result, said = rolled_back
    manifest = result.manifests["local"]
    prune, quantize = manifest["ledger"]
    assert (prune["kept"], prune["forced"]) == (True, False)
    assert (quantize["kept"], quantize["forced"]) == (False, False)
    assert quantize["why"].startswith("rolled back because nothing was gained: latency ")
    assert f"quantize: {quantize['why']}" in said
    assert quantize["after"]["precision"] == "int8"
    assert quantize["after"]["size_bytes"] > quantize["before"]["size_bytes"] == quantize["size_bytes"]
    assert quantize["latency"] == quantize["before"]["latency"]
    assert quantize["before"]["metric"] == prune["after"]["metric"] == prune["metric"]
    assert manifest["artifact"]["precision"] == "fp32"
    assert manifest["artifact"]["size_bytes"] < quantize["after"]["size_bytes"]


def test_the_folder_holds_what_goes_on_and_what_was_made_beside_it(rolled_back):
    folder = rolled_back[0].folder
    onward, made = edgekd.load(folder / "02-quantize"), edgekd.load(folder / "02-quantize" / stages.ASIDE)
    assert onward.quantization is None
    assert made.quantization == {"lowering": "int8_dynamic"}
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("01-prune", "02-quantize")]
    assert weights[0] == weights[1]
    assert not (folder / "01-prune" / stages.ASIDE).exists()


def test_a_decision_is_taken_up_and_not_made_again(rolled_back, make_recipe, tmp_path, monkeypatch):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(rolled_back[0].folder, run)
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "bundle")

    def refuse(*arguments):
        raise StageError("weighed again")

    monkeypatch.setattr(stages, "guard", refuse)
    recipe = make_recipe(stages=[PRUNE, {"quantize": {"lowering": "int8_dynamic"}}])
    again = compress(recipe, run)
    assert again.manifests["local"]["ledger"] == rolled_back[0].manifests["local"]["ledger"]
    assert again.manifests["local"]["artifact"]["precision"] == "fp32"


def test_force_ships_what_gains_nothing(finished):
    quantize = finished.manifests["local"]["ledger"][-1]
    assert (quantize["kept"], quantize["forced"]) == (True, True)
    assert quantize["why"].startswith("kept because of force, though nothing was gained: ")
    assert finished.manifests["local"]["artifact"]["precision"] == "int8"
    assert not (finished.folder / "03-quantize" / stages.ASIDE).exists()


def test_where_nothing_is_measured_size_and_metric_decide(make_recipe, tmp_path):
    recipe = make_recipe(
        targets=["gpu-cuda"],
        stages=[PRUNE, {"distill": {"epochs": 1, "learning_rate": 1e-12, "precision": "fp32"}}],
        budget={"size_mb": 100, "sequence": 12},
    )
    prune, distill = compress(recipe, tmp_path / "run").manifests["gpu-cuda"]["ledger"]
    assert prune["kept"]
    assert "latency could not be measured (" in prune["why"]
    assert "CUDAExecutionProvider" in prune["after"]["latency"]["reason"]
    assert prune["after"]["lowering"] == "fp16"
    assert not distill["kept"], "weights that did not move are no gain"
    assert distill["before"]["metric"] == distill["after"]["metric"]
