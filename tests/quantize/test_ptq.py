"""Post-training quantization: ranges, fitted weights, layers that stay float, and data that is not as it should be."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import DataError, ModelError, RecipeError, StageError, TargetError
from edgekd.export.lower import lower
from edgekd.export.names import multiplied
from edgekd.export.onnx import export_float
from edgekd.export.parity import onnx_logits, torch_logits
from edgekd.quantize import Quantize, candidates, prepare
from edgekd.quantize.bias import as_they_are, correct_biases
from edgekd.quantize.build import build_form, rescue
from edgekd.quantize.forms import find_ranges, write_form
from edgekd.quantize.linear import channel_scales, linear_layers, observe_inputs, rounded
from edgekd.quantize.observers import OBSERVERS, Seen, find
from edgekd.quantize.prepare import Sources
from edgekd.quantize.ptq import Candidate, choose
from edgekd.quantize.rounding import output_error, round_adaptively
from edgekd.quantize.sensitivity import Sensitivity, divergence, fewest, rank, units
from edgekd.quantize.smooth import smooth
from edgekd.student import load_student
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target, probe
from edgekd.tasks import TASKS
from edgekd.tasks.image_classification import EncodedImages

TASK = "text-classification"
DENSE = "bert.encoder.layer.1.output.dense"

pytestmark = pytest.mark.usefixtures("one_thread")


def spoiled(student, size: float = 500.0):
    """A model with one layer that matters, whose weights have an outlier that no input ever meets."""
    changed = student.with_model(copy.deepcopy(student.model))
    up = changed.model.get_submodule("bert.encoder.layer.1.intermediate.dense")
    up.weight.data[0], up.bias.data[0] = 0.0, -30.0  # its GELU is exactly 0
    changed.model.get_submodule(DENSE).weight.data.mul_(20)  # so that what the layer says matters
    changed.model.get_submodule(DENSE).weight.data[:, 0] = size
    return changed


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lowering": "int9"}, "unknown lowering 'int9'"),
        ({"observer": "median"}, "unknown observer 'median'"),
        ({"weight_bits": 3}, "unknown weight_bits '3'; choose one of: 2, 4, 8"),
        ({"smooth": 1.5}, "smooth must be"),
        ({"smooth": -0.1}, "smooth must be"),
        ({"group": 24}, "group must be 0 or a power of two of at least 16, not 24"),
        ({"group": -32}, "group must be 0 or a power of two"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"freeze_ranges": 1.1}, "freeze_ranges must be"),
        ({"losses": {"nothing": 1.0}}, "unknown loss 'nothing'"),
        ({"calibration": 0}, "calibration must be at least 1"),
    ],
)
def test_wrong_settings_are_named(settings, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Quantize(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight_bits": 2}, "ternary.*set epochs, or weight_bits: 4"),
        ({"learned": True}, "learns step sizes in training; set epochs"),
        ({"weight_bits": 2, "group": 32, "epochs": 1}, r"one scale for a matrix; leave out group: 32"),
        ({"epochs": 1, "smooth": 0.5, "rounding": "adaptive"}, "smooth, rounding: adaptive would undo"),
        ({"tune": True, "rounding": "adaptive"}, "both choose how weights are rounded"),
    ],
)
def test_settings_that_do_not_go_together_are_named_when_the_stage_runs(settings, said, bert, make_context) -> None:
    with pytest.raises(RecipeError, match=said):
        Quantize(**settings).run(bert, make_context())


def test_forms_with_quantized_weights_alone_are_made_where_they_are_named() -> None:
    here = probe(load_target("local"))
    assert {"int4_weights", "int8_weights"} <= set(here.forms)
    assert not {"int4_weights", "int8_weights"} & {*candidates("auto", here), *candidates("int8", here)}
    assert candidates("int4_weights", here) == ("int4_weights",)
    assert candidates("int4_weights", load_target("npu-qualcomm-qcs9100")) == ()


def test_bits_and_kinds_of_ranges_limit_the_forms(bert, make_context, clock) -> None:
    context = make_context()
    made = Quantize(weight_bits=4, tolerance=0.9, fallback=False).run(bert, context)
    assert {c["lowering"] for c in context.notes["candidates"] if c["lowering"].startswith("int")} == {"int4_weights"}
    assert made.quantization is not None
    with pytest.raises(TargetError, match="with weight_bits: 4"):
        Quantize(weight_bits=4, lowering="int8").run(bert, context)
    for kind, word in (("static", "static"), ("dynamic", "dynamic")):
        context = make_context()
        Quantize(activations=kind, tolerance=0.9, fallback=False, calibration=16).run(bert, context)
        forms = [c["lowering"] for c in context.notes["candidates"] if c["lowering"].startswith("int8")]
        assert forms
        assert all(word in form for form in forms)


def test_the_fastest_good_form_within_the_size_is_chosen(tmp_path) -> None:
    def made(name: str, metric: float, ms: float | None, kilobytes: int) -> Candidate:
        (tmp_path / name).write_bytes(bytes(kilobytes * 1000))
        return Candidate(name, tmp_path / name, metric, ms)

    found = [made("a", 0.9, 1.0, 900), made("b", 0.9, 2.0, 500), made("c", 0.9, 3.0, 400), made("d", 0.5, 0.1, 10)]
    assert choose(found, 0.9, 0.01).lowering == "a"
    assert choose(found, 0.9, 0.01, size_mb=0.6).lowering == "b"
    assert choose(found, 0.9, 0.01, size_mb=0.05).lowering == "a"
    assert choose(found, 0.99, 0.01, size_mb=0.05).metric == 0.9


# Ranges


@pytest.fixture(scope="module")
def relu(tmp_path_factory):
    """y = Relu(x), as a file."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="/relu/Relu")], "g", info[:1], info[1:])
    file = tmp_path_factory.mktemp("relu") / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    return file


def test_observers_cut_off_what_hardly_ever_comes(relu) -> None:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=2000).astype(np.float32)} for _ in range(20)]
    feeds[7]["x"][0], feeds[7]["x"][1] = 400.0, -400.0
    plain = find(relu, feeds, "minmax", ("Relu",))
    assert plain["y"] == (0.0, 400.0)
    assert plain["x"] == (-400.0, 400.0)
    for observer in (name for name in OBSERVERS if name != "mse"):
        low, high = find(relu, feeds, observer, ("Relu",))["x"]
        assert -200 < low < -2 < 2 < high < 200, observer
        low, high = find(relu, feeds, observer, ("Relu",))["y"]
        assert -0.5 < low < 0.5
        assert 2 < high < 200, observer


def test_least_squares_finds_the_best_limits() -> None:
    values = np.concatenate([np.random.default_rng(1).normal(size=500_000), [12.0, -12.0]])
    seen = Seen(-12.0, 12.0)
    seen.add(values)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = np.round(-low / scale)
        return float(((((np.clip(np.round(values / scale) + zero, 0, 255)) - zero) * scale - values) ** 2).mean())

    assert error(*OBSERVERS["mse"](seen)) < 0.6 * error(-12, 12)


def test_constant_activations_get_a_form_that_still_computes(bert, tmp_path, make_context) -> None:
    silent = bert.with_model(copy.deepcopy(bert.model))
    for layer in (0, 1):
        norm = silent.model.get_submodule(f"bert.encoder.layer.{layer}.output.LayerNorm")
        norm.weight.data.zero_()
        norm.bias.data.fill_(0.0 if layer else 0.7)
    context = make_context(silent)
    graph = export_float(silent, TASK, tmp_path / "float.onnx")
    reference = onnx_logits(graph, context.validation)
    few = context.train.take(np.arange(12))
    for observer in ("minmax", *OBSERVERS):
        ranges = find_ranges(graph, "int8_static", few, observer=observer)
        assert any(low == high for low, high in ranges.values())
        file = lower(graph, tmp_path / "q.onnx", "int8_static", ranges=ranges, model_type="bert")
        got = onnx_logits(file, context.validation)
        assert np.isfinite(got).all()
        assert np.abs(got - reference).max() < 0.1 * max(1.0, np.abs(reference).max())


def test_bad_values_in_calibration_data_are_refused_by_name(relu) -> None:
    feeds = [{"x": np.ones(3, np.float32)}, {"x": np.array([1, np.nan, 2], np.float32)}]
    for observer in ("minmax", "mse"):
        with pytest.raises(DataError, match="calibration example 1 has values in x that are not finite"):
            find(relu, feeds, observer, ("Relu",))
    with pytest.raises(DataError, match="not finite"):
        find(relu, [{"x": np.array([np.inf], np.float32)}], "minmax", None)
    with pytest.raises(RecipeError, match="needs calibration data, and there is none"):
        find(relu, [], "minmax", None)


def test_a_broken_weight_is_refused_with_the_tensor_that_it_spoils(bert, make_context, tmp_path) -> None:
    broken = bert.with_model(copy.deepcopy(bert.model))
    context = make_context()
    broken.model.get_submodule(DENSE).weight.data[0, 0] = np.nan
    graph = export_float(broken, TASK, tmp_path / "broken.onnx")
    for observer in ("minmax", "percentile"):
        with pytest.raises((ModelError, RecipeError), match=r"layer\.1/output"):
            find_ranges(graph, "int8_static", context.train, observer=observer)
    with pytest.raises(DataError, match=r"what goes into bert\.encoder\.layer\.2.* is not finite"):
        observe_inputs(broken.model, sample_batches(context.train, 16, seed=0))


def test_without_calibration_data_nothing_is_guessed(bert, make_context) -> None:
    context = make_context()
    empty = replace(context, train=context.train.take(np.zeros(0, np.int64)))
    with pytest.raises(DataError, match="needs training examples to calibrate on"):
        Quantize(lowering="int8_static").run(bert, empty)
    with pytest.raises(DataError, match="fitting weights needs training examples"):
        Quantize(lowering="int8_dynamic", bias_correction=True).run(bert, empty)


# Weights fitted without training


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_scale_migration_leaves_the_float_model_as_it_is(kind, make_model) -> None:
    auto = "AutoModelForImageClassification" if kind == "vit" else "AutoModelForSequenceClassification"
    student = load_student(make_model(kind), auto_class=auto)
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        batch = {"pixel_values": torch.randn(16, 1, 8, 8, generator=generator)}
        # A channel far beyond the others, as large models have.
        student.model.vit.encoder.layer[0].layernorm_before.weight.data[3] *= 80
    else:
        batch = {"input_ids": torch.randint(5, 40, (16, 12), generator=generator)}
        student.model.get_submodule("classifier")
    changed, count = smooth(student, [batch], 0.5)
    with torch.no_grad():
        before, after = student.model(**batch).logits, changed.model(**batch).logits
    assert count == (9 if kind == "vit" else 3)
    assert not all(
        torch.equal(a, b) for a, b in zip(student.model.parameters(), changed.model.parameters(), strict=True)
    )
    assert float((before - after).abs().max()) < 1e-4 * max(1.0, float(before.abs().max()))
    if kind == "vit":
        x = torch.randn(4, 5, 32, generator=generator)
        old, new = (each.model.vit.encoder.layer[0].layernorm_before(x).abs() for each in (student, changed))
        assert new.amax() / new.mean() < 0.9 * old.amax() / old.mean()


def test_adaptive_rounding_keeps_outputs_better_and_the_scales_as_they_are() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(48, 12), torch.nn.Linear(12, 1))
    x = torch.randn(500, 4) @ torch.randn(4, 48)
    before = copy.deepcopy(layer)
    inputs = observe_inputs(Plain(layer), [{"x": x}])
    inputs = {name.removeprefix("inner."): each for name, each in inputs.items()}
    ratio = round_adaptively(layer, inputs, bits=4)
    old, new = before[0].weight, layer[0].weight
    error = output_error(old - new, inputs["0"].second)
    nearest = output_error(old - rounded(old, 4), inputs["0"].second)
    assert error < 0.2 * nearest
    assert ratio < 1
    for name, after in linear_layers(layer).items():
        scale = channel_scales(before.get_submodule(name).weight, 4)
        torch.testing.assert_close(channel_scales(after.weight, 4), scale)
        steps = after.weight.detach() / scale.detach()
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert float((steps - before.get_submodule(name).weight.detach() / scale.detach()).abs().max()) <= 1.001


class Plain(torch.nn.Module):
    """A model of keyword inputs around a module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_corrected_biases_take_the_mean_error_away() -> None:
    torch.manual_seed(1)
    before = torch.nn.Sequential(torch.nn.Linear(40, 8))
    after = copy.deepcopy(before)
    after[0].weight.data.copy_(rounded(before[0].weight, 4))
    x = torch.randn(300, 40) + torch.randn(40)
    inputs = {"0": observe_inputs(Plain(before), [{"x": x}])["inner.0"]}
    shift = (before(x) - after(x)).mean(0).abs().max()
    assert correct_biases(before, after, inputs, as_they_are) == 1
    assert (before(x) - after(x)).mean(0).abs().max() < 1e-3 * shift


def test_padding_does_not_count_as_input(bert, make_context) -> None:
    context = make_context()
    alone = [context.train.collate(np.array([i]), int(context.train.lengths[i])) for i in range(6)]
    together = [context.train.collate(np.arange(6))]
    one, all_ = (observe_inputs(bert.model, each)["bert.encoder.layer.0.output.dense"] for each in (alone, together))
    assert one.rows == all_.rows == int(context.train.lengths[:6].sum())
    torch.testing.assert_close(one.mean, all_.mean, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lowering", ["int8_dynamic", "int8_static"])
def test_fitted_weights_ship_and_are_told(lowering, bert, make_context, tmp_path) -> None:
    context = make_context()
    settings = Quantize(
        lowering=lowering, smooth=0.5, rounding="adaptive", bias_correction=True, calibration=32, tolerance=0.5
    )
    result = settings.run(bert, context)
    assert result.quantization["prepared"] is True
    assert result.quantization["smooth"] == 0.5
    assert context.notes["rounding_error"] < 1
    assert context.notes["smoothed"] == 3
    again = onnx_logits(export_float(result, TASK, tmp_path / "again.onnx"), context.validation)
    np.testing.assert_allclose(again, torch_logits(bert.model, context.validation), atol=0.5)
    with pytest.raises(ModelError, match=f"already quantized to {lowering}.*quantize the folder it was made from"):
        Quantize().run(result, context)


# Layers that stay float


def test_layers_that_read_the_same_tensor_go_together(bert, tmp_path) -> None:
    found = units(multiplied(onnx.load(export_float(bert, TASK, tmp_path / "float.onnx"))))
    assert len(found) == 3 * 4 + 2
    joint = [unit for unit in found if len(unit) > 1]
    assert [name.rsplit(".", 1)[1] for name in joint[0]] == ["query", "key", "value"]
    assert len(joint) == 3


def test_the_shortest_list_of_the_worst_is_taken() -> None:
    ranked = [Sensitivity((name,), kl) for name, kl in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 0.0))]
    asked = []

    def good(kept):
        asked.append(list(kept))
        return len(kept) == 2

    assert fewest(ranked, good) == ("a", "b")
    assert asked == [["a"], ["a", "b"]]
    assert fewest(ranked, lambda kept: len(kept) > 2) is None


def test_divergence_is_that_of_the_probabilities() -> None:
    p, q = np.array([[2.0, 0.0]]), np.array([[0.0, 0.0]])
    first = 1 / (1 + np.exp(-2.0))
    expected = first * np.log(first / 0.5) + (1 - first) * np.log((1 - first) / 0.5)
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence(p, p + 5) == pytest.approx(0)


def test_the_layer_with_the_outlier_is_found_and_stays_float(bert, make_context, clock) -> None:
    bad = spoiled(bert)
    context = make_context(bad)
    np.testing.assert_allclose(
        torch_logits(bad.model, context.validation), onnx_logits(
            export_float(bad, TASK, context.work / "check.onnx"), context.validation), atol=1e-3,
    )  # fmt: skip
    result = Quantize(lowering="int8_dynamic", tolerance=0.03).run(bad, context)
    worst = context.notes["sensitivity"][0]
    assert worst["modules"] == [DENSE]
    assert worst["kl"] > 3 * context.notes["sensitivity"][1]["kl"]
    assert result.quantization["keep_float"] == [DENSE]
    [candidate] = context.notes["candidates"]
    assert candidate["keep_float"] == [DENSE]
    assert candidate["metric"] >= context.notes["float_metric"] - 0.03
    graph = onnx.load(context.work / "int8_dynamic_part.onnx")
    assert DENSE in multiplied(graph)
    assert "bert.encoder.layer.0.output.dense" not in multiplied(graph)
    plain = make_context(bad)
    left = Quantize(lowering="int8_dynamic", tolerance=0.03, fallback=False)
    try:
        left.run(bad, plain)
    except Exception as error:  # noqa: BLE001 — too few equal answers to ship at all is as good
        assert "agrees with the torch model" in str(error)  # noqa: PT017
    else:
        assert plain.notes["candidates"][0]["metric"] < candidate["metric"]


@pytest.mark.parametrize("form", ["int4_weights", "int8_weights"])
def test_only_layers_that_packing_changes_are_tried_in_float(make_model, make_context, form) -> None:
    vit = load_student(make_model("vit"), auto_class="AutoModelForImageClassification")
    vit = vit.with_model(copy.deepcopy(vit.model))
    bad = "vit.encoder.layer.0.intermediate.dense"
    vit.model.get_submodule(bad).weight.data[:, 0] = 1e4 * torch.rand(len(vit.model.get_submodule(bad).weight))
    vit.model.vit.encoder.layer[0].layernorm_after.weight.data[0] = 0
    vit.model.vit.encoder.layer[0].layernorm_after.bias.data[0] = 0
    vit.model.get_submodule("vit.encoder.layer.0.output.dense").weight.data.mul_(10)
    data = images(vit)
    context = replace(make_context(), teacher=vit, task=TASKS["image-classification"], train=data, validation=data)
    result = Quantize(lowering=form, tolerance=0.02).run(vit, context)
    tried = [tuple(each["modules"]) for each in context.notes["sensitivity"]]
    assert tried[0] == (bad,)
    assert all("projection" not in name for modules in tried for name in modules)
    assert bad in result.quantization["keep_float"]


def images(student, count: int = 48) -> EncodedImages:
    pixels = np.random.default_rng(0).normal(size=(count, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        labels = student.model(pixel_values=torch.from_numpy(pixels)).logits.argmax(1).numpy()
    return EncodedImages(
        pixels=None, raw=None, store=pixels, table=None, rows=np.arange(count), labels=labels, digests=[b""] * count
    )


def test_layers_that_stay_float_are_as_they_were_before_rounding(bert, make_context) -> None:
    context = make_context()
    settings = Quantize(rounding="adaptive", bias_correction=True, calibration=16)
    graph = export_float(bert, TASK, context.work / "float.onnx")
    reference = onnx_logits(graph, context.validation)
    sources = Sources(settings, bert, bert, graph, context, 1.0)
    built = build_form("int8_dynamic", sources, reference)
    saved = rescue(built, sources, reference, floor=0.0)
    kept = saved.student.quantization["keep_float"]
    assert kept
    for name, layer in linear_layers(saved.student.model).items():
        old = bert.model.get_submodule(name)
        assert (name in kept) == (torch.equal(layer.weight, old.weight) and torch.equal(layer.bias, old.bias)), name
    again = export_float(saved.student, TASK, context.work / "again.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(saved.file).graph.initializer}
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(again).graph.initializer}
    for node in (multiplied(onnx.load(again))[name] for name in kept):
        own = floats[node.input[1]]
        assert any(np.array_equal(each, own) or np.array_equal(each, own.T) for each in weights.values()), node.name


def test_observers_of_8_bits_do_not_cut_what_has_16(bert, make_context, tmp_path) -> None:
    graph = export_float(bert, TASK, tmp_path / "float.onnx")
    few = make_context().train.take(np.arange(6))
    plain = find_ranges(graph, "int16_qdq", few)
    for observer in ("mse", "entropy"):
        assert find_ranges(graph, "int16_qdq", few, observer=observer) == plain
    assert find_ranges(graph, "int8_qdq", few, observer="mse") != plain


def test_convolutions_that_fitting_does_not_reach_are_told_of(make_model, make_context) -> None:
    vit = load_student(make_model("vit"), auto_class="AutoModelForImageClassification")
    data = images(vit)
    context = replace(make_context(), teacher=vit, task=TASKS["image-classification"], train=data, validation=data)
    settings = Quantize(lowering="int8_dynamic", bias_correction=True, tolerance=0.9, fallback=False)
    settings.run(vit, context)
    assert context.notes["not_fitted"] == 1


def test_a_form_without_a_wider_one_is_not_taken_apart(bert, make_context) -> None:
    context = make_context(bert, target=load_target("npu-qualcomm-qcs9100"))
    settings = Quantize(lowering="int16_qdq", tolerance=0.0, calibration=16)
    with contextlib.suppress(StageError):
        settings.run(spoiled(bert), context)
    assert "sensitivity" not in context.notes


def test_smoothing_is_not_forgotten_by_tuning(bert, make_context) -> None:
    context = make_context(bert)
    sources = Sources(Quantize(smooth=0.5, tune=True, calibration=16), bert, bert, Path(), context, 1.0)
    assert sources.smoothed.model is not bert.model
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "tune", lambda student, *_: given.append(student) or (student, {}))
        assert sources.tuned[0] is sources.smoothed
    assert given == [sources.smoothed]


def test_only_forms_that_could_win_are_repaired(bert, make_context, clock) -> None:
    bad = spoiled(bert)
    context = make_context(bad)
    clock.ms = {form: 5.0 for form in context.target.forms if form.startswith("int8")} | {"fp32_fused": 1.0}
    Quantize(tolerance=0.03, calibration=16).run(bad, context)
    assert context.notes["chosen"].startswith("fp32")
    assert "sensitivity" not in context.notes
    context = make_context(bad)
    clock.ms = dict.fromkeys(context.target.forms, 5.0) | {"int8_dynamic": 0.5}
    clock.runs.clear()
    Quantize(tolerance=0.03, calibration=16).run(bad, context)
    assert context.notes["chosen"] == "int8_dynamic"
    assert {each["lowering"] for each in context.notes["sensitivity"]} == {"int8_dynamic"}
    assert len(clock.runs) == 2  # once more with the repaired form


def test_what_stays_float_stays_so_in_the_bundle(bert, make_context, tmp_path) -> None:
    from edgekd.pipeline.artifact import build

    context = make_context()
    kept = replace(bert, quantization={"lowering": "int8_dynamic", "keep_float": [DENSE]})
    kept.save(tmp_path / "saved")
    again = load_student(tmp_path / "saved", auto_class="AutoModelForSequenceClassification")
    file = build(again, context.task, context.validation, tmp_path / "made", gate=False).file
    assert list(multiplied(onnx.load(file))) == [DENSE]
    file = build(again, context.task, context.validation, tmp_path / "other", lowering="int8_weights", gate=False).file
    assert DENSE not in multiplied(onnx.load(file))  # it was another form's choice


def test_every_unit_is_quantized_alone() -> None:
    seen = []
    scores = {"a": 1.0, "b": 5.0, "c": 2.0}

    def build(kept):
        seen.append(set(kept))
        return kept

    def say(kept):
        [own] = {"a", "b", "c"} - set(kept)
        return np.array([[scores[own], 0.0]])

    found = rank([("a",), ("b",), ("c",)], build, say, np.array([[0.0, 0.0]]))
    assert [each.modules for each in found] == [("b",), ("c",), ("a",)]
    assert seen == [{"b", "c"}, {"a", "c"}, {"a", "b"}]


# Models that are not as usual


def test_a_model_quantized_elsewhere_is_refused(bert, make_context) -> None:
    elsewhere = bert.with_model(copy.deepcopy(bert.model))
    elsewhere.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="quantized elsewhere"):
        Quantize().run(elsewhere, make_context())


def test_a_folder_quantized_elsewhere_is_refused_when_it_is_loaded(make_model, tmp_path) -> None:
    import json
    import shutil

    folder = shutil.copytree(make_model("bert"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantization_config"):
        load_student(folder, auto_class="AutoModelForSequenceClassification")


def test_an_earlier_choice_of_a_form_is_made_anew(bert, make_context) -> None:
    context = make_context()
    before = {"lowering": "int8_static", "ranges": {"x": [0, 1]}, "keep_float": [DENSE]}
    result = Quantize(lowering="int8_dynamic", tolerance=0.9).run(replace(bert, quantization=before), context)
    assert result.quantization == {"lowering": "int8_dynamic"}
    assert result.model is bert.model
    trained = replace(bert, quantization={"lowering": "int8_static", "scheme": {"weight_bits": 8}})
    result = Quantize(lowering="int8_dynamic", tolerance=0.9).run(trained, context)
    assert result.quantization == {"lowering": "int8_dynamic", "scheme": {"weight_bits": 8}}
    with pytest.raises(ModelError, match="trained under quantization already"):
        Quantize(bias_correction=True).run(trained, context)


def test_a_layer_with_one_neuron_is_quantized_in_every_form(bert, make_context, tmp_path) -> None:
    thin = bert.with_model(copy.deepcopy(bert.model))
    layer = thin.model.bert.encoder.layer[1]
    family = thin.family
    family.slice_neurons(layer, torch.tensor([5]))
    thin = bert.with_model(thin.model)
    context = make_context(thin)
    graph = export_float(thin, TASK, tmp_path / "float.onnx")
    reference = onnx_logits(graph, context.validation)
    for form in ("int8_dynamic", "int8_static", "int8_weights", "int4_weights"):
        ranges = find_ranges(graph, form, context.train) if form == "int8_static" else None
        file = lower(graph, tmp_path / "q.onnx", form, ranges=ranges, model_type="bert")
        assert np.abs(onnx_logits(file, context.validation) - reference).max() < 0.5 * np.abs(reference).max(), form
    result = Quantize(
        lowering="int8_dynamic", rounding="adaptive", bias_correction=True, smooth=0.5, tolerance=0.9, calibration=16
    ).run(thin, context)
    assert result.arch.layers[1].neurons == 1


def test_dead_inputs_and_outliers_survive_fitting(bert, make_context) -> None:
    bad = spoiled(bert, size=1e6)
    context = make_context(bad)
    result = Quantize(
        lowering="int4_weights", rounding="adaptive", bias_correction=True, tolerance=0.9, calibration=16
    ).run(bad, context)
    got = onnx_logits(context.work / "int4_weights.onnx", context.validation)
    assert np.isfinite(got).all()
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


def test_settings_of_the_grid_reach_the_file(bert, make_context) -> None:
    context = make_context()
    Quantize(lowering="int4_weights", group=16, tolerance=0.9, fallback=False).run(bert, context)
    graph = onnx.load(context.work / "int4_weights.onnx").graph
    [node] = [n for n in graph.node if n.op_type == "MatMulNBits" and n.name.startswith("/bert/encoder/layer.0/output")]
    told = {item.name: item.i for item in node.attribute}
    assert (told["bits"], told["block_size"], told["accuracy_level"]) == (4, 16, 4)
    tables = {t.name: numpy_helper.to_array(t) for t in onnx.load(context.work / "int4_weights.onnx").graph.initializer}
    assert all(table.dtype != np.float32 or table.size < 2000 for table in tables.values())


@pytest.mark.parametrize("form", ["int8_dynamic", "int8_static", "int4_weights"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_tables_of_4_bits_reach_the_file_and_are_remembered(bert, make_context, form: str, epochs: int) -> None:
    context = make_context()
    result = Quantize(lowering=form, table_bits=4, epochs=epochs, batch_size=8, tolerance=0.9, fallback=False).run(
        bert, context
    )
    assert result.quantization is not None
    assert result.quantization["table_bits"] == 4
    graph = export_float(result, TASK, context.work / "again.onnx")
    ranges = find_ranges(graph, form, context.train) if form == "int8_static" else None
    file = write_form(result, graph, form, context.work / "form.onnx", ranges=ranges)
    loaded = onnx.load(file).graph
    [table] = [node for node in loaded.node if node.op_type == "GatherBlockQuantized" and "word_embed" in node.name]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.initializer}
    own = result.model.get_input_embeddings().weight
    assert stored[table.input[0]].shape == (own.shape[0], own.shape[1] // 2)
    difference = np.abs(onnx_logits(file, context.validation) - onnx_logits(graph, context.validation))
    assert difference.max() < 0.5 * np.abs(onnx_logits(graph, context.validation)).max()


@pytest.mark.parametrize("helps", [True, False])
def test_tflite_that_misses_the_tolerance_is_tried_with_wider_norms(bert, make_context, monkeypatch, helps):
    """What that came to is remembered, so that later stages and the export make the same file."""
    made: list[bool | None] = []

    def write(student, task, output, examples, budget, told=None):
        made.append((student.quantization or {}).get("wide"))
        output.write_text("wide" if made[-1] else "narrow")
        told["wide"] = bool(made[-1])
        return output

    def logits(file, encoded):
        right = torch_logits(bert.model, encoded)
        wrong = np.arange(len(right)) < (1 if file.read_text() == "wide" and helps else 4)
        return np.where(wrong[:, None], right[:, ::-1], right)

    monkeypatch.setattr("edgekd.quantize.build.write_tflite", write)
    monkeypatch.setattr("edgekd.quantize.build.form_logits", logits)
    monkeypatch.setattr("edgekd.quantize.build.require_parity", lambda *args: None)
    context = make_context(target=load_target("npu-ethos-u55-256"))
    student = Quantize(lowering="int8_tflite", tolerance=0.02, calibration=8).run(bert, context)
    assert made == [None, True]
    assert student.quantization["wide"] is helps
    assert student.quantization["lowering"] == "int8_tflite"
    made.clear()
    assert (
        Quantize(lowering="int8_tflite", tolerance=0.5, calibration=8).run(bert, context).quantization["wide"] is False
    )
    assert made == [None], "within the tolerance nothing else is tried"
