"""Fake quantization rounds as runtimes do, lets gradients through, and leaves nothing but rounded weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn
from torch.nn.utils import parametrize

from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.export.onnx import export_float, quiet_export
from edgekd.families.compact import install as install_operators
from edgekd.quantize.fake import Scheme, install
from edgekd.quantize.fake.grid import (
    best_clip,
    grouped,
    quantize_all,
    quantize_each,
    quantize_learned,
    snap_rows,
    snap_weight,
    ternary,
    ungrouped,
    weight_integers,
)
from edgekd.quantize.fake.observers import OBSERVERS
from edgekd.student import Student, load_student

SIDES = {"vit": "Image", "deit": "Image", "resnet": "Image", "resnet-bottleneck": "Image"}


@pytest.fixture(autouse=True)
def _threads(one_thread: Any) -> None:
    torch.manual_seed(0)


@pytest.fixture
def student(make_model: Any) -> Any:
    def make(kind: str, **operators: Any) -> Student:
        found = load_student(make_model(kind), auto_class=f"AutoModelFor{SIDES.get(kind, 'Sequence')}Classification")
        if operators:
            last = len(found.arch.layers) - 1
            layers = [
                replace(layer, **operators.get(f"layer{i if i < last else 'last'}", {}))
                for i, layer in enumerate(found.arch.layers)
            ]
            install_operators(found.model, found.family, layers)
            return found.with_model(found.model)
        return found

    return make


def batch_of(kind: str, samples: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind in SIDES:
        return {"pixel_values": torch.randn(samples, 1, 8, 8, generator=generator)}
    lengths = torch.tensor([9, 5, 3, 7, 2, 8])[:samples]
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    ids = torch.randint(5, 40, mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# What the runtimes derive


def _dynamic_onnx(student: Student, folder: Path) -> Path:
    """The int8 file of a student's linear layers, as onnxruntime makes it from the float one."""
    source = export_float(student, "text-classification", folder / "float.onnx")
    with quiet_export():
        quantize_dynamic(
            source, folder / "int8.onnx", op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True
        )
    return folder / "int8.onnx"


def test_onnxruntime_finds_the_same_integers_again(student: Any, tmp_path: Path) -> None:
    trained = student("bert")
    quantized = install(trained.model, Scheme())
    expected = {name: weight_integers(module.weight)[0].numpy() for name, module in linears(trained.model).items()}
    quantized.strip()
    graph = onnx.load(_dynamic_onnx(trained, tmp_path)).graph
    stored = [numpy_helper.to_array(each) for each in graph.initializer if each.data_type == TensorProto.INT8]
    assert len(stored) >= len(expected)
    for name, integers in expected.items():
        assert any(np.array_equal(each, integers.T) for each in stored), name
    assert all(np.abs(integers).max(axis=1).min() == 127 for integers in expected.values())


def test_a_padded_batch_gives_what_the_int8_graph_gives_one_by_one(student: Any, tmp_path: Path) -> None:
    trained, batch = student("bert"), batch_of("bert")
    exact = logits_of(trained.model, batch)
    quantized = install(trained.model, Scheme())
    fake = logits_of(trained.model, batch)
    quantized.strip()
    session = ort.InferenceSession(str(_dynamic_onnx(trained, tmp_path)), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    rows = []
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        feeds = {name: value[i : i + 1, :length].numpy() for name, value in batch.items()}
        feeds["token_type_ids"] = np.zeros((1, length), np.int64)
        rows.append(session.run(None, {name: value for name, value in feeds.items() if name in names})[0])
    real = torch.from_numpy(np.concatenate(rows))
    assert (fake - real).abs().max() < 0.1 * (fake - exact).abs().max()


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_dynamic_activations_are_those_of_dynamicquantizelinear(shift: float) -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node, back], "one", [value("x", TensorProto.FLOAT, None)], [value("y", TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = torch.randn(3, 40, 16) + shift
    lows, highs = inputs.flatten(1).amin(1), inputs.flatten(1).amax(1)
    rounded = quantize_each(inputs, lows, highs)
    real = np.stack([session.run(None, {"x": each.numpy()})[0] for each in inputs])
    different = np.abs(rounded.numpy() - real) > 1e-5
    assert different.mean() < 1e-3  # ties, which the two divide in other ways


def test_groups_are_found_again_from_their_largest_magnitudes() -> None:
    weight = torch.randn(6, 70)
    snapped = snap_weight(weight, bits=4, group=32, clip=best_clip(weight, bits=4, group=32))
    integers, scales = weight_integers(snapped, bits=4, group=32)
    rows = np.pad(snapped.numpy(), ((0, 0), (0, 26))).reshape(18, 32)
    again = np.abs(rows).max(1) / 7
    np.testing.assert_allclose(again, scales.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(np.rint(rows / again[:, None]).reshape(6, 96)[:, :70], integers.numpy())
    assert np.abs(integers.numpy()).max() == 7
    torch.testing.assert_close(snap_weight(snapped, bits=4, group=32), snapped)


@pytest.mark.parametrize(
    "snap",
    [
        lambda w: snap_weight(w),
        lambda w: snap_weight(w, bits=4),
        lambda w: snap_weight(w, bits=4, group=16),
        ternary,
        lambda w: ternary(w, per_row=True),
        lambda w: snap_weight(ternary(w)),
        snap_rows,
    ],
    ids=["int8", "int4", "int4 groups", "ternary", "ternary rows", "ternary then int8", "rows"],
)
def test_snapping_again_changes_nothing_and_zero_stays_zero(snap: Any) -> None:
    weight = torch.randn(10, 48) * torch.logspace(-3, 2, 10)[:, None]
    weight[2, ::2], weight[5] = 0.0, 0.0
    once = snap(weight)
    torch.testing.assert_close(snap(once), once, rtol=1e-6, atol=0.0)
    assert (once[weight == 0] == 0).all()
    assert not torch.equal(once, weight)


def test_ternary_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.5, 0.1]])  # mean 1.15, threshold 0.805
    torch.testing.assert_close(ternary(weight), torch.tensor([[2.0, -2.0, 0.0, 0.0]]))
    rows = torch.tensor([[1.0, 1.0], [10.0, 0.0]])
    torch.testing.assert_close(ternary(rows, per_row=True), rows)
    assert (ternary(rows)[0] == 0).all()


def test_grouping_is_undone() -> None:
    for shape in ((5, 40), (4, 3, 3, 3)):
        weight = torch.randn(shape)
        assert torch.equal(ungrouped(grouped(weight, 16), weight), weight)


def test_cutting_weights_of_four_bits_makes_the_error_less() -> None:
    weight = torch.randn(8, 256)
    clip = best_clip(weight, bits=4, group=0)
    plain, cut = (snap_weight(weight, bits=4, clip=each) for each in (1.0, clip))
    assert (clip < 1).all()
    assert (cut - weight).square().sum() < 0.95 * (plain - weight).square().sum()


# Gradients


def test_gradients_pass_straight_through_within_the_range_and_not_beyond() -> None:
    inputs = torch.tensor([[-3.0, -0.5, 0.2, 0.9, 7.0]], requires_grad=True)
    quantize_all(inputs, torch.tensor(-1.0), torch.tensor(1.0)).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def test_weights_behind_the_rounding_get_all_gradients(student: Any) -> None:
    for bits in (8, 2):
        model = student("bert").model
        quantized = install(model, Scheme(weight_bits=bits))
        model(**batch_of("bert")).logits.square().sum().backward()
        originals = quantized.originals()
        assert set(originals) == set(linears(model))
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in originals.values())
        quantized.strip()


def test_learned_ranges_have_the_gradient_of_lsq() -> None:
    inputs, limit = torch.randn(50), 127
    scale = torch.tensor(0.01, requires_grad=True)
    quantize_learned(inputs, -limit * scale, limit * scale, symmetric=True).sum().backward()
    assert scale.grad is not None
    ratio = inputs / 0.01
    inside = (ratio >= -128) & (ratio <= 127)
    each = torch.where(inside, ratio.round() - ratio, ratio.sign() * torch.where(ratio > 0, 127, 128))
    expected = each.sum() / (50 * 127) ** 0.5
    torch.testing.assert_close(scale.grad, expected, rtol=1e-3, atol=1e-3)


def test_a_range_of_nothing_lets_gradients_through() -> None:
    inputs = torch.tensor([0.3, -0.2, 0.0], requires_grad=True)
    end = torch.tensor(0.0)
    quantize_learned(inputs, end, end, symmetric=True).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.tolist() == [1.0, 1.0, 1.0]


# On models


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "vit", "deit", "resnet"])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(activations="static", attention=True, embeddings=True)])
def test_every_family_is_rounded_and_comes_back_with_snapped_weights(student: Any, kind: str, scheme: Scheme) -> None:
    model, batch = student(kind).model, batch_of(kind)
    before, names = logits_of(model, batch), list(model.state_dict())
    quantized = install(model, scheme)
    quantized.calibrate([batch])
    fake = logits_of(model, batch)
    spread = before.max() - before.min()
    assert 0 < (fake - before).abs().max() < 0.3 * spread
    quantized.strip()
    assert list(model.state_dict()) == names
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    after = logits_of(model, batch)
    assert 0 < (after - before).abs().max() < 0.3 * spread
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = install(model, replace(scheme, activations="none", attention=False))
    torch.testing.assert_close(logits_of(model, batch), after, rtol=1e-4, atol=1e-5)
    again.strip()


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_padding_has_no_influence(student: Any, activations: str) -> None:
    model, batch = student("bert").model, batch_of("bert")
    quantized = install(model, Scheme(activations=activations, attention=True))
    quantized.calibrate([batch])
    together = logits_of(model, batch)
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = logits_of(model, {name: value[i : i + 1, :length] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)
    wide = {name: nn.functional.pad(value, (0, 7)) for name, value in batch.items()}
    again = install(copy.deepcopy(student("bert").model), Scheme(activations=activations, attention=True))
    (model,) = again._model
    again.calibrate([wide])
    torch.testing.assert_close(again.ranges(), quantized.ranges(), rtol=1e-5, atol=1e-5)


def test_readers_of_one_tensor_share_a_range(student: Any) -> None:
    model = student("bert").model
    quantized = install(model, Scheme(activations="static"))
    quantized.calibrate([batch_of("bert")])
    ranges = quantized.ranges()
    assert set(ranges) == set(linears(model))
    for layer in range(3):
        attention = f"bert.encoder.layer.{layer}.attention"
        shared = {quantized.places[f"{attention}.self.{name}"] for name in ("query", "key", "value")}
        assert len(shared) == 1
        assert quantized.places[f"{attention}.output.dense"] not in shared
    assert len(quantized.quantizers) == 14


@pytest.mark.parametrize(
    "operators",
    [
        {"layerlast": {"tokens": 1}},
        {"layer1": {"tokens": 4}, "layerlast": {"tokens": 1}},
        {"layer1": {"shares": True}},
        {"layer0": {"rank": 4}, "layer1": {"rank": 4}},
        {"layer0": {"norm": "affine", "activation": "relu"}},
    ],
    ids=["first token", "fewer tokens", "shared attention", "low rank", "affine"],
)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_compact_layers_go_along(student: Any, kind: str, operators: Any) -> None:
    model, batch = student(kind, **operators).model, batch_of(kind)
    before = logits_of(model, batch)
    for scheme in (Scheme(attention=True), Scheme(activations="static", attention=True)):
        quantized = install(model, scheme)
        quantized.calibrate([batch])
        fake = logits_of(model, batch)
        assert 0 < (fake - before).abs().mean() < 0.2 * (before.max() - before.min())
        alone = logits_of(model, {name: value[1:2] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], fake[1], rtol=1e-2, atol=1e-2)
        if scheme.activations == "static":
            assert set(quantized.ranges()) == set(linears(model)) | {
                name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
            }
            assert all(name.rpartition(":")[0] for name in quantized.attention_ranges())
        quantized.strip()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_rounded_in_any_implementation(student: Any, implementation: str) -> None:
    model, batch = student("bert").model, batch_of("bert")
    if implementation == "eager":
        model.set_attn_implementation("eager")
    results = []
    for attention in (False, True):
        copied = copy.deepcopy(model)
        quantized = install(copied, Scheme(activation_bits=8, attention=attention))
        results.append(logits_of(copied, batch))
        quantized.strip()
    assert (results[0] - results[1]).abs().max() > 1e-4


def test_sixteen_bits_are_nearer_than_eight(student: Any) -> None:
    batch, errors = batch_of("bert"), []
    for bits in (8, 16):
        model = student("bert").model
        install(model, Scheme(activations="none")).strip()
        exact = logits_of(model, batch)
        quantized = install(model, Scheme(activations="static", activation_bits=bits, symmetric=bits == 16))
        quantized.calibrate([batch])
        errors.append(float((logits_of(model, batch) - exact).abs().max()))
        quantized.strip()
    assert errors[1] < 0.05 * errors[0]


def test_few_bits_spare_what_is_outside_of_the_layers(student: Any) -> None:
    model = student("bert").model
    quantized = install(model, Scheme(weight_bits=2, embeddings=True, embedding_bits=2))
    quantized.strip()
    assert len(model.bert.encoder.layer[0].output.dense.weight.unique()) == 3
    assert len(model.classifier.weight.unique()) > 3
    assert len(model.bert.embeddings.word_embeddings.weight[7].unique()) == 3


def test_kept_modules_stay_float(student: Any) -> None:
    model = student("bert").model
    before = copy.deepcopy(model.state_dict())
    scheme = Scheme(activations="static", keep_float=("bert.encoder.layer.0", "classifier"), attention=True)
    quantized = install(model, scheme)
    quantized.calibrate([batch_of("bert")])
    assert not any("layer.0." in name or "classifier" in name for name in quantized.places)
    quantized.strip()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any("layer.0." in name or "classifier" in name for name in changed)


# Ranges


def test_ranges_follow_training_until_they_stand(student: Any) -> None:
    model, batch = student("vit").model, batch_of("vit")
    quantized = install(model, Scheme(activations="static"))
    quantized.calibrate([batch])
    quantized.freeze(2)
    model.train(), quantized.train()
    wider = {"pixel_values": 3 * batch["pixel_values"]}
    seen = []
    for _ in range(4):
        seen.append(quantized.ranges())
        model(**wider)
        quantized.step()
    name = "vit.embeddings.patch_embeddings.projection"
    highs = [ranges[name][1] for ranges in seen]
    assert highs[0] < highs[1] < highs[2] == highs[3]
    model.eval(), quantized.eval()
    quantized.freeze(100)
    model(**wider)
    assert quantized.ranges() == seen[3]


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_observers_choose_ranges_that_fit(observer: str) -> None:
    values = torch.randn(40000)
    values[7] = 60.0
    quantized = install(_Keyed(nn.Linear(40, 4)), Scheme(activations="static"), observer=observer)
    quantized.calibrate([{"x": part} for part in values.view(4, 250, 40)])
    ((low, high),) = quantized.ranges().values()
    assert -6 < low < -2
    if observer == "minmax":
        assert (low, high) == (float(values.min()), 60.0)
    else:
        assert 2.5 < high < 60


@pytest.mark.parametrize("observer", ["mse", "entropy", "percentile"])
def test_searched_ranges_are_narrower_and_better_than_all(observer: str) -> None:
    values = torch.randn(60000)
    whole = (values.min(), values.max())
    low, high = OBSERVERS[observer](values, *whole, bits=4, symmetric=False)
    assert whole[0] < low < -1
    assert 1 < high < whole[1]
    errors = [(quantize_all(values, *ends, bits=4) - values).square().mean() for ends in ((low, high), whole)]
    assert errors[0] < errors[1] * (0.9 if observer == "mse" else 1.0)


class _Keyed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out


def test_learned_ranges_move_by_gradients(student: Any) -> None:
    model, batch = student("vit").model, batch_of("vit")
    quantized = install(model, Scheme(activations="static", weight_bits=4), learned=True)
    quantized.calibrate([batch])
    model.train(), quantized.train()
    before = quantized.ranges()
    parameters = [p for name, p in (*quantized.named_parameters(), *model.named_parameters()) if "change" in name]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
    optimizer.step()
    assert quantized.ranges() != before
    quantized.strip()
    integers, _ = weight_integers(model.vit.encoder.layer[0].output.dense.weight, bits=4)
    assert integers.abs().amax(1).min() == 7


# Convolutions


@pytest.mark.parametrize("kind", ["resnet", "resnet-bottleneck"])
def test_batch_norms_are_folded_and_stand(student: Any, kind: str, tmp_path: Path) -> None:
    found, batch = student(kind), batch_of(kind)
    model = found.model.train()
    for _ in range(3):
        model(**batch)
    before = logits_of(model.eval(), batch)
    quantized = install(model, Scheme(activations="none"))
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)
    quantized.strip()
    quantized = install(model, Scheme())
    model.train(), quantized.train()
    statistics = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model(**batch).logits.sum().backward()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in statistics.items())
    quantized.strip()
    after = logits_of(model.eval(), batch)
    found.with_model(model).save(tmp_path / "saved")
    again = load_student(tmp_path / "saved", auto_class="AutoModelForImageClassification")
    torch.testing.assert_close(logits_of(again.model, batch), after)


# Masks


def test_zeros_stay_zeros_and_masks_go_along(student: Any) -> None:
    model, batch = student("bert").model, batch_of("bert")
    dense = model.bert.encoder.layer[0].output.dense
    mask = torch.rand_like(dense.weight) > 0.5

    class Masked(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * mask

    parametrize.register_parametrization(dense, "weight", Masked())
    quantized = install(model, Scheme())
    assert (dense.weight[~mask] == 0).all()
    assert set(quantized.originals()) == set(linears(model))
    model(**batch).logits.sum().backward()
    gradient = dense.parametrizations.weight.original.grad
    assert gradient is not None
    assert (gradient[~mask] == 0).all()
    assert gradient[mask].abs().sum() > 0
    quantized.strip()
    assert (dense.weight[~mask] == 0).all()
    assert weight_integers(dense.weight)[0].abs().max() == 127


# What can go wrong


def test_refusals_name_what_is_wrong(student: Any) -> None:
    model = student("bert").model
    with pytest.raises(RecipeError, match="observer"):
        install(model, Scheme(), observer="median")
    with pytest.raises(ModelError, match="keep_float names what the model has not"):
        install(model, Scheme(keep_float=("bert.nothing",)))
    install(model, Scheme())
    with pytest.raises(ModelError, match="under fake quantization already"):
        install(model, Scheme())


def test_calibration_needs_examples_and_finite_values(student: Any) -> None:
    model = student("vit").model
    quantized = install(model, Scheme(activations="static"))
    with pytest.raises(DataError, match="none"):
        quantized.calibrate([])
    with pytest.raises(DataError, match="not finite"):
        quantized.calibrate([{"pixel_values": torch.full((2, 1, 8, 8), torch.nan)}])


@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(activations="static"), Scheme(weight_bits=4), Scheme(weight_bits=2)]
)
def test_constant_activations_zero_weights_and_single_neurons(scheme: Scheme) -> None:
    model = _Keyed(nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 3)))
    nn.init.zeros_(model.inner[2].weight)
    quantized = install(model, scheme)
    inputs = {"x": torch.zeros(5, 8)}
    quantized.calibrate([inputs])
    expected = model.inner[2].bias.detach().expand(5, 3)
    torch.testing.assert_close(model(**inputs), expected)
    quantized.strip()
    assert torch.isfinite(model.inner[0].weight).all()


def test_a_scheme_survives_json() -> None:
    scheme = Scheme(weight_bits=4, group=32, activations="static", keep_float=("a.b",), attention=True)
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    with pytest.raises(RecipeError, match="bits_of_weights"):
        Scheme.from_dict({"bits_of_weights": 8})
    for wrong in ({"weight_bits": 3}, {"activations": "sometimes"}, {"activation_bits": 4}, {"embedding_bits": 3}):
        with pytest.raises(RecipeError):
            Scheme(**wrong)
