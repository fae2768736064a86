"""A stage that gains nothing is rolled back; the ledger says what was seen and why."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import edgekd
from edgekd import devices
from edgekd.context import Budget, Silent
from edgekd.data import DataSpec
from edgekd.errors import ModelError, StageError, StoreError, TargetError
from edgekd.export import parity
from edgekd.latency.stats import Samples
from edgekd.operators import guard as timing
from edgekd.pipeline import compress, prepare, sides, stages
from edgekd.pipeline.guard import JUDGES, Decision, decide, guard, measured_gains
from edgekd.pipeline.sides import Scale, Side, divergence, paired_interval, weigh
from edgekd.quantize import Quantize
from edgekd.report.gains import gains
from edgekd.stages import STAGES
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target, probe

PRUNE = {"prune": {"layers": [0, 2], "heads": 2, "neurons": [40, 24], "samples": 32}}
DOCS = Path(__file__).parents[2] / "docs"


def side(
    ms=2.0, ratio=None, interval=None, size=1_000_000, metric=0.9, kl=0.1, kind="measured", reason=None, change=None
):
    latency = {"kind": "unavailable", "reason": reason} if reason else {"kind": kind, "p50_ms": ms}
    latency |= {} if ratio is None else {"ratio": ratio}
    latency |= {} if interval is None else {"ratio_ci99": interval}
    return Side(
        shape="s",
        lowering="fp32",
        precision="fp32",
        latency=latency,
        size_bytes=size,
        metric=metric,
        metric_change_ci95=change,
        divergence=kl,
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


METRIC = [
    (0.91, (0.005, 0.015), 0.5, True),
    (0.89, (-0.015, -0.005), 0.01, False),
    (0.91, (-0.005, 0.025), 0.09, True),
    (0.91, (-0.005, 0.025), 0.1, False),
    (0.89, (-0.025, 0.005), 0.09, True),
    (0.89, (-0.025, 0.005), 0.2, False),
    (0.9, (0.0, 0.0), 0.09, True),
    (0.9, (0.0, 0.0), 0.1, False),
]


@pytest.mark.parametrize(("metric", "change", "kl", "kept"), METRIC)
def test_the_metric_counts_beyond_chance_and_nearness_to_the_teacher_within_it(metric, change, kl, kept):
    decision = decide(("metric",), side(), side(metric=metric, kl=kl, change=change))
    assert decision.kept == kept
    assert ("a tie" in decision.why) == (change[0] <= 0 <= change[1])
    assert f"{change[0]:+.4f} to {change[1]:+.4f}" in decision.why


def test_a_tie_without_a_teacher_to_be_near_to_is_not_held_against_a_stage():
    decision = decide(("metric",), side(), side(metric=0.89, kl=None, change=(-0.03, 0.01)))
    assert decision.why.startswith("kept though no gain is known: metric")
    assert not decide(("metric",), side(), side(metric=0.8, kl=None, change=(-0.2, -0.1))).kept


def hits(right, wrong):
    return np.array([True] * right + [False] * wrong)


def test_the_change_of_the_metric_is_told_from_the_examples_that_differ():
    before = np.concatenate([hits(80, 0), hits(0, 12), hits(2, 0), hits(0, 6)])
    after = np.concatenate([hits(80, 0), hits(12, 0), hits(0, 2), hits(0, 6)])
    low, high = paired_interval(before, after)
    assert 0 < low < 0.1 < high <= 0.14, "12 gained and 2 lost of 100"
    assert paired_interval(after, before) == pytest.approx((-high, -low))
    assert paired_interval(before, before) == (0, 0)
    for gained, z in ((3, 3**0.5), (4, 2.0)):
        low, _ = paired_interval(hits(50, gained), hits(50 + gained, 0))
        assert (low > 0) == (z > 1.96), "as McNemar's test says"


def test_one_example_more_or_less_is_a_tie():
    low, high = paired_interval(hits(160, 40), hits(161, 39))
    assert low < 0 < high


def test_the_later_side_has_the_interval_of_the_change(setup, pruned, monkeypatch, tmp_path):
    pretend(monkeypatch, MEDIANS)
    before, after = weigh(scale(setup), setup.teacher, pruned, tmp_path)
    low, high = after.metric_change_ci95
    assert low <= after.metric - before.metric <= high
    assert after.to_dict()["metric_change_ci95"] == pytest.approx([low, high], rel=1e-3)
    assert "metric_change_ci95" not in before.to_dict()


def test_one_gain_is_enough_and_losses_elsewhere_are_told():
    slower_but_smaller = side(3.0, ratio=1.5, interval=[1.4, 1.6], size=250_000)
    decision = decide(("latency", "size"), side(2.0), slower_but_smaller)
    assert decision.kept
    assert "ratio 1.500 (99 % interval 1.400–1.600)" in decision.why
    assert "size 1.00 → 0.25 MB (-75.0%)" in decision.why


SLOW = [
    ({"ratio": 1.5, "interval": [1.4, 1.6]}, False),
    ({"ratio": 1.04, "interval": [1.02, 1.06]}, True),
    ({"ratio": 1.38, "kind": "vendor_estimate"}, False),
    ({"ratio": 1.04, "kind": "vendor_estimate"}, True),
]


@pytest.mark.parametrize(("latency", "kept"), SLOW)
def test_fewer_bytes_in_flash_do_not_make_up_for_a_worse_latency(latency, kept):
    before, after = replace(side(2.0), flash_bytes=1000), replace(side(3.0, **latency), flash_bytes=800)
    buys = ("latency", "flash", "transfer")
    decision = decide(buys, before, after)
    assert (decision.kept, decision.forced) == (kept, False)
    assert decision.why.startswith("rolled back because fewer bytes made it slower: latency") != kept
    forced = decide(buys, before, after, force=True)
    assert (forced.kept, forced.forced) == (True, not kept)


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


MEDIANS = {
    "teacher": 8.0, "before/fp32_fused": 4.0, "before/fp32_lean": 4.5, "before/fp32": 5.0,
    "after/fp32_fused": 3.0, "after/fp32_lean": 2.5, "after/fp32": 2.0,
}  # fmt: skip


def test_both_sides_and_the_teacher_take_turns_and_the_fastest_form_of_each_counts(
    setup, pruned, monkeypatch, tmp_path
):
    asked = pretend(monkeypatch, MEDIANS)
    before, after = weigh(scale(setup), setup.teacher, pruned, tmp_path)
    assert len(asked) == 1, "one run"
    assert len(asked[0]) == 7
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
    slow = {"fp32/": 9.0, "fp32_lean/": 9.0, "teacher": 8.0, "before": 4.0}
    asked = pretend(monkeypatch, {**slow, "after": 3.92}, {**slow, "after": second})
    _, after = weigh(scale(setup), setup.teacher, pruned, tmp_path)
    assert [len(files) for files in asked] == [7, 3], "the second run has the chosen forms only"
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


@pytest.mark.parametrize("error", [TargetError("the board is gone"), StoreError("no space left on the device")])
def test_what_tells_nothing_of_the_student_is_not_held_against_it(setup, pruned, monkeypatch, tmp_path, error):
    for layers in (2, 3):
        with monkeypatch.context() as patch:
            refusing(patch, layers, error)
            with pytest.raises(type(error), match=str(error)):
                weigh(scale(setup), setup.teacher, pruned, tmp_path / str(layers))


class Board:
    """A compiler that raises for every model."""

    def __init__(self, error):
        self.error = error

    def unavailable(self, target):
        return None

    def compile(self, target, model, folder, *, timeout):
        raise self.error


def test_a_compiler_that_refuses_is_told_from_one_that_is_not_there(setup, pruned, monkeypatch, tmp_path):
    npu = replace(scale(setup, "npu-qualcomm-qcs9100"), budget=Budget(sequence=32))
    for error in (ModelError("the compiler refuses TopK"), StageError("it wrote no binary")):
        monkeypatch.setitem(devices.COMPILERS, "qualcomm", Board(error))
        _, after = weigh(replace(npu, known={}), setup.teacher, pruned, tmp_path)
        assert after.problem == str(error)
    monkeypatch.setitem(devices.COMPILERS, "qualcomm", Board(TargetError("onnxruntime-qnn is gone")))
    with pytest.raises(TargetError, match="is gone"):
        weigh(npu, setup.teacher, pruned, tmp_path)


def noted(monkeypatch, tmp_path, interval, *, force=False):
    """What `operators` notes of an operator of these figures, in its own words."""
    for name in ("before", "after"):
        (tmp_path / name).write_bytes(b"equal")
    monkeypatch.setattr(timing, "time_pair", lambda *arguments: (interval[0], interval))
    verdict = timing.weigh(tmp_path / "before", tmp_path / "after", SimpleNamespace(budget=Budget()), force=force)
    return {"operators": [{"operator": "first_token", **verdict.to_dict()}]}


SLOWER = (side(), side(3.0, ratio=1.5, interval=[1.4, 1.6]))


def test_what_operators_measured_in_the_form_that_ships_is_not_judged_by_the_float_form(
    setup, pruned, monkeypatch, tmp_path
):
    monkeypatch.setattr("edgekd.pipeline.guard.weigh", lambda *arguments: SLOWER)
    paid = noted(monkeypatch, tmp_path, (1.2, 1.3))
    stage, rest = STAGES["operators"](), (setup.teacher, pruned, tmp_path)
    before, after, decision = guard(scale(setup), stage, *rest, paid)
    assert (before, after) == SLOWER
    assert (decision.kept, decision.forced) == (True, False)
    assert decision.why.startswith(
        "kept because the stage measured a gain in the form that is to ship (first_token: 1.2"
    )
    assert "as fp32: latency 2 → 3 ms, ratio 1.500" in decision.why
    row = {"before": before.to_dict(), "after": after.to_dict(), **decision.to_dict(), "stage": "operators"}
    assert gains({"ledger": [row]})[0]["remark"], "reports say so"
    forced = noted(monkeypatch, tmp_path, (0.5, 0.6), force=True)
    unmeasured = {"operators": [{"operator": "first_token", "kept": True, "reason": "kept because it is exact, unmea"}]}
    dropped = noted(monkeypatch, tmp_path, (0.5, 0.6))
    for notes in (forced, unmeasured, dropped, {}, None):
        assert measured_gains(notes or {}) == ""
        assert not guard(scale(setup), stage, *rest, notes)[-1].kept
    both = {"operators": [*dropped["operators"], *paid["operators"]]}
    assert guard(scale(setup), stage, *rest, both)[-1].kept
    broken = replace(SLOWER[1], problem="no TopK")
    monkeypatch.setattr("edgekd.pipeline.guard.weigh", lambda *arguments: (SLOWER[0], broken))
    assert not guard(scale(setup), stage, *rest, paid)[-1].kept


def test_the_runner_hands_on_what_operators_noted(make_recipe, monkeypatch, tmp_path):
    def run(self, student, ctx):
        ctx.notes["operators"] = [{"operator": "rank", "kept": True, "reason": "kept: so fast", "speedup": 1.5}]
        model = copy.deepcopy(student.model)
        model.classifier.bias.data += 1e-3
        return student.with_model(model)

    monkeypatch.setattr(STAGES["operators"], "run", run)
    recipe = make_recipe(targets=["gpu-cuda"], stages=[{"operators": {}}], budget={"size_mb": 100, "sequence": 12})
    [entry] = compress(recipe, tmp_path / "run").manifests["gpu-cuda"]["ledger"]
    assert entry["kept"]
    assert entry["why"].startswith("kept because the stage measured a gain in the form that is to ship (rank: so fast)")
    assert entry["before"]["size_bytes"] == pytest.approx(entry["after"]["size_bytes"], rel=0.01)


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
