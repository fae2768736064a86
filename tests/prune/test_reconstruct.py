from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgekd.student import load_student
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.reconstruct import hindrance, output_errors, reconstruct

TEXT = ("bert", "distilbert")


def load(make_model, kind: str):
    task = "Sequence" if kind in ("bert", "distilbert", "roberta", "electra") else "Image"
    return load_student(make_model(kind), auto_class=f"AutoModelFor{task}Classification")


def batches(kind: str, padding: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    if kind not in ("bert", "distilbert", "roberta", "electra"):
        return [{"pixel_values": torch.randn(24, 1, 8, 8, generator=generator)} for _ in range(2)]
    made = []
    for length in (9, 12):
        ids = torch.randint(5, 40, (24, length), generator=generator)
        mask = torch.ones_like(ids)
        ids, mask = (torch.nn.functional.pad(each, (0, padding)) for each in (ids, mask))
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def smaller(student, heads: int = 2, neurons: int = 24, layers=None):
    kept = student.arch.layers if layers is None else tuple(student.arch.layers[i] for i in layers)
    shapes = tuple(replace(layer, heads=min(layer.heads, heads), neurons=min(layer.neurons, neurons)) for layer in kept)
    return replace(student.arch, layers=shapes)


def whole_error(student, small, given) -> float:
    """Of the logits of the whole model."""
    with torch.no_grad():
        pairs = [(student.model(**batch).logits, small.model(**batch).logits) for batch in given]
    return sum(float((a - b).square().sum()) for a, b in pairs)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "vit", "resnet", "resnet-bottleneck"])
def test_every_layer_is_nearer_to_the_uncut_one(make_model, kind):
    student, given = load(make_model, kind), batches(kind)
    small = cut(student, smaller(student, neurons=2 if "resnet" in kind else 24), measure_importance(student, given))
    fitted = reconstruct(student, small, given)
    before, after = output_errors(student, small, given), output_errors(student, fitted, given)
    assert all(b > 1e-4 for b in before)
    assert sum(after) < 0.9 * sum(before)
    assert whole_error(student, fitted, given) < whole_error(student, small, given)
    assert fitted.arch == small.arch


@pytest.mark.parametrize("kind", ["bert", "vit", "resnet"])
def test_no_matrix_fits_worse_than_before(make_model, kind):
    """One layer is cut, in attention alone or in its last convolution, so that nothing else differs."""
    student, given = load(make_model, kind), batches(kind)
    importance = measure_importance(student, given, criterion="magnitude")
    for layer in range(len(student.arch.layers)):
        for damping in (0.0001, 1.0, 100.0):
            shapes = list(student.arch.layers)
            changed = {"heads": 1} if shapes[layer].heads else {"neurons": 2}
            shapes[layer] = replace(shapes[layer], **changed)
            small = cut(student, replace(student.arch, layers=tuple(shapes)), importance)
            fitted = reconstruct(student, small, given, damping=damping)
            before, after = matrix_error(student, small, layer, given), matrix_error(student, fitted, layer, given)
            assert 0 < after < before


def matrix_error(student, small, layer: int, given) -> float:
    """Of what attention's output matrix or the last convolution gives; over the variance the next norm sees."""
    outputs, sums = [], []
    for each in (student, small):
        block = each.family.layers(each.model)[layer]
        module = each.family.head_input(block) or each.family.neuron_input(block)
        handles = [module.register_forward_hook(lambda m, i, o, into=outputs: into.append(o.double()))]
        if each is student and each.arch.head_dim:
            norm = block.layernorm_after if each.arch.family == "vit" else block.attention.output.LayerNorm
            handles.append(norm.register_forward_hook(lambda m, i, o: sums.append(i[0].double())))
        with torch.no_grad():
            for batch in given:
                each.model(**batch)
        for handle in handles:
            handle.remove()
    weights = [1 / each.var(-1, correction=0, keepdim=True) for each in sums] or [torch.ones(())] * len(given)
    pairs = zip(outputs[: len(given)], outputs[len(given) :], weights, strict=True)
    return sum(float(((a - b).square() * weight).sum()) for a, b, weight in pairs)


@pytest.mark.parametrize("kind", [*TEXT, "vit"])
def test_what_follows_from_the_rest_is_dropped_without_loss(make_model, kind):
    """Neurons and heads that repeat others: the kept ones take over, and the model says the same."""
    student, given = load(make_model, kind), batches(kind)
    places = student.family.places
    for layer in student.family.layers(student.model):
        up, down = layer.get_submodule(places.up), layer.get_submodule(places.down)
        up.weight.data[32:], up.bias.data[32:] = up.weight.data[:32], up.bias.data[:32]
        down.weight.data[:, 32:] *= 0.9
        value = student.family.qkv(layer)
        for part in value:
            part.weight.data[16:], part.bias.data[16:] = part.weight.data[:16], part.bias.data[:16]
    small = cut(student, smaller(student, heads=2, neurons=32), prefix(student))
    fitted = reconstruct(student, small, given, damping=1e-9)
    assert max(output_errors(student, small, given)) > 1e-3
    assert max(output_errors(student, fitted, given)) < 1e-8
    assert whole_error(student, fitted, given) < 1e-6


def prefix(student):
    return measure_importance(replace(student, ordered=True), ())


def test_resnet_drops_channels_that_repeat_others(make_model):
    student, given = load(make_model, "resnet"), batches("resnet")
    for block in student.family.layers(student.model):
        first, second = block.layer[0], block.layer[1].convolution
        half = first.convolution.out_channels // 2
        first.convolution.weight.data[half:] = first.convolution.weight.data[:half]
        for values in first.normalization.state_dict().values():
            if values.dim():
                values[half:] = values[:half]
        second.weight.data[:, half:] *= 0.5
    halves = tuple(replace(layer, neurons=layer.neurons // 2) for layer in student.arch.layers)
    small = cut(student, replace(student.arch, layers=halves), prefix(student))
    fitted = reconstruct(student, small, given, damping=1e-9)
    assert max(output_errors(student, small, given)) > 1e-4
    assert max(output_errors(student, fitted, given)) < 1e-8


@pytest.mark.parametrize("kind", TEXT)
def test_padding_changes_nothing(make_model, kind):
    student = load(make_model, kind)
    small = cut(student, smaller(student), prefix(student))
    one = reconstruct(student, small, batches(kind)).model.state_dict()
    two = reconstruct(student, small, batches(kind, padding=7)).model.state_dict()
    assert all(torch.allclose(values, two[name], atol=1e-4) for name, values in one.items())
    assert any(not torch.equal(values, small.model.state_dict()[name]) for name, values in one.items())


def test_what_was_not_cut_stays_and_nothing_given_is_changed(make_model):
    student, given = load(make_model, "bert"), batches("bert")
    before = {name: values.clone() for name, values in student.model.state_dict().items()}
    same = cut(student, student.arch, prefix(student))
    fitted = reconstruct(student, same, given)
    assert all(torch.equal(values, before[name]) for name, values in fitted.model.state_dict().items())
    small = cut(student, smaller(student), prefix(student))
    own = {name: values.clone() for name, values in small.model.state_dict().items()}
    changed = reconstruct(student, small, given).model.state_dict()
    assert all(torch.equal(values, before[name]) for name, values in student.model.state_dict().items())
    assert all(torch.equal(values, own[name]) for name, values in small.model.state_dict().items())
    outputs = ("attention.output.dense", "layer.0.output.dense", "layer.1.output.dense", "layer.2.output.dense")
    for name, values in changed.items():
        assert torch.equal(values, own[name]) == (not any(part in name for part in outputs))


def test_layers_are_matched_by_their_source(make_model):
    student, given = load(make_model, "bert"), batches("bert")
    small = cut(student, smaller(student, layers=[0, 2]), measure_importance(student, given))
    fitted = reconstruct(student, small, given)
    assert sum(output_errors(student, fitted, given)) < sum(output_errors(student, small, given))
    whole = cut(student, replace(student.arch, layers=student.arch.layers[::2]), prefix(student))
    assert output_errors(student, whole, given) == [0.0, 0.0]


def test_what_cannot_be_fitted_is_told_and_left_alone(make_model):
    student, given = load(make_model, "bert"), batches("bert")
    narrow = cut(student, replace(student.arch, hidden=16), replace(prefix(student), hidden=torch.arange(32)))
    assert hindrance(student, narrow) == "the hidden state was narrowed"
    assert reconstruct(student, narrow, given) is narrow
    other = replace(student, arch=replace(student.arch, layers=(replace(student.arch.layers[0], rank=4),)))
    assert "compute otherwise" in hindrance(student, replace(other, model=student.model))
    assert hindrance(student, cut(student, smaller(student), prefix(student))) == ""
