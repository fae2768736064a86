from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from edgekd.errors import DataError, ModelError
from edgekd.student import load_student
from edgekd.surgery import cut
from edgekd.surgery.curves import layer_errors
from edgekd.surgery.reconstruct import reconstruct


def load(make_model, kind: str):
    task = "Sequence" if kind == "bert" else "Image"
    return load_student(make_model(kind), auto_class=f"AutoModelFor{task}Classification")


def batches(kind: str, padding: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    if kind != "bert":
        return [{"pixel_values": torch.randn(24, 1, 8, 8, generator=generator)} for _ in range(2)]
    ids = torch.randint(5, 40, (40, 10), generator=generator)
    mask = torch.ones_like(ids)
    ids, mask = (torch.nn.functional.pad(each, (0, padding)) for each in (ids, mask))
    return [{"input_ids": ids, "attention_mask": mask}]


@pytest.mark.parametrize("kind", ["bert", "vit", "resnet", "resnet-bottleneck"])
def test_errors_rise_as_less_is_kept(make_model, kind):
    student = load(make_model, kind)
    curves = layer_errors(student, batches(kind), 1, 8)
    for layer, heads, neurons in zip(student.arch.layers, curves.heads, curves.neurons, strict=True):
        assert len(heads) == layer.heads + 1
        assert len(neurons) == layer.neurons + 1
        for errors in (heads, neurons):
            assert float(errors[-1]) == 0
            assert bool((errors[1:] <= errors[:-1]).all())
        assert float(neurons[0]) == pytest.approx(1, abs=1e-6)
    assert all(sorted(o.tolist()) == list(range(len(o))) for o in (*curves.head_order, *curves.neuron_order))


def test_a_curve_is_what_reconstruction_leaves(make_model):
    """With one layer cut, the error measured in the reconstructed model is the one the curve promises."""
    student, given = load(make_model, "bert"), batches("bert")
    curves = layer_errors(student, given, damping=1e-6)
    for heads in (1, 2, 3):
        shapes = (*student.arch.layers[:2], replace(student.arch.layers[2], heads=heads))
        small = cut(student, replace(student.arch, layers=shapes), curves.importance())
        fitted = reconstruct(student, small, given, damping=1e-6)
        seen = []
        for each in (student, fitted):
            output = each.family.layers(each.model)[2].attention.output
            handles = [
                output.dense.register_forward_hook(lambda m, i, o, into=seen: into.append(o)),
                output.LayerNorm.register_forward_hook(lambda m, i, o, into=seen: into.append(i[0])),
            ]
            with torch.no_grad():
                each.model(**given[0])
            for handle in handles:
                handle.remove()
        whole, stream, got, _ = (each.double().flatten(0, 1) for each in seen)
        weights = 1 / (stream.var(-1, correction=0, keepdim=True) + 1e-6)
        mean = (weights * whole).sum(0) / weights.sum()
        measured = (weights * (whole - got).square()).sum() / (weights * (whole - mean).square()).sum()
        assert float(measured) == pytest.approx(float(curves.heads[2][heads]), rel=0.01)


def test_padding_changes_nothing(make_model):
    student = load(make_model, "bert")
    one, two = layer_errors(student, batches("bert")), layer_errors(student, batches("bert", padding=6))
    for first, second in zip((*one.heads, *one.neurons), (*two.heads, *two.neurons), strict=True):
        assert torch.allclose(first, second, atol=1e-4)
    for name in ("drops", "head_weights", "neuron_weights"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-4)


def test_weights_and_drops_tell_what_the_layer_does(make_model):
    student = load(make_model, "vit")
    idle, silent = student.family.layers(student.model)[1:]
    for module in (idle.attention.output.dense, idle.output.dense, silent.attention.output.dense):
        module.weight.data.zero_()
        module.bias.data.zero_()
    curves = layer_errors(student, batches("vit"))
    assert curves.drops[1] == curves.head_weights[1] == curves.neuron_weights[1] == 0
    assert curves.head_weights[2] == 0
    assert curves.neuron_weights[2] > 1e-4
    assert curves.drops[2] >= curves.neuron_weights[2]
    assert curves.error(2, 1, 32) == pytest.approx(curves.neuron_weights[2] * float(curves.neurons[2][32]))


def test_what_may_not_be_left_out_costs_infinitely_much(make_model):
    student = load(make_model, "resnet")
    curves = layer_errors(student, batches("resnet"))
    droppable = [student.family.droppable(student.model, i) for i in range(len(student.arch.layers))]
    assert [math.isfinite(drop) for drop in curves.drops] == droppable
    assert True in droppable
    assert False in droppable


def test_importance_keeps_what_was_removed_last(make_model):
    student = load(make_model, "bert")
    curves = layer_errors(student, batches("bert"), head_step=2, neuron_step=4)
    importance = curves.importance()
    for order, scores in zip(curves.neuron_order, importance.neurons, strict=True):
        assert torch.argsort(scores).tolist() == order.tolist()
    for order, scores in zip(curves.head_order, importance.heads, strict=True):
        assert torch.argsort(scores).tolist() == order.tolist()


def test_mistakes_are_told(make_model):
    student = load(make_model, "bert")
    with pytest.raises(DataError, match="give at least one"):
        layer_errors(student, [])
    other = replace(student.arch, layers=(replace(student.arch.layers[0], tokens=4), *student.arch.layers[1:]))
    with pytest.raises(ModelError, match="before the operators are changed"):
        layer_errors(replace(student, arch=other), batches("bert"))
