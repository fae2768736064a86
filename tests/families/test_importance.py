from __future__ import annotations

import pytest
import torch

from edgekd.student import load_student
from edgekd.surgery import measure_importance
from edgekd.surgery.importance import CRITERIA, top


@pytest.fixture
def bert(make_model):
    return load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")


def batch(mask_from: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(4, 8, dtype=torch.long)
    if mask_from is not None:
        mask[:, mask_from:] = 0
    return {"input_ids": torch.randint(5, 40, (4, 8), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_silent_neuron_and_a_silent_head_matter_least(bert, criterion):
    layer = bert.family.layers(bert.model)[1]
    layer.intermediate.dense.weight.data[5] = 0
    layer.intermediate.dense.bias.data[5] = 0
    layer.attention.self.value.weight.data[8:16] = 0
    layer.attention.self.value.bias.data[8:16] = 0
    scores = measure_importance(bert, [batch()], criterion=criterion)
    assert int(scores.neurons[1].argmin()) == 5
    assert scores.neurons[1][5] == 0
    assert int(scores.heads[1].argmin()) == 1


def test_padding_does_not_count(bert):
    padded, other = batch(mask_from=5), batch(mask_from=5)
    other["input_ids"][:, 5:] = 3
    one, two = measure_importance(bert, [padded]), measure_importance(bert, [other])
    for first, second in zip(one.neurons, two.neurons, strict=True):
        assert torch.allclose(first, second, atol=1e-5)
    assert torch.allclose(one.layers, two.layers, atol=1e-5)


def test_batches_add_up_whatever_their_order(bert):
    first, second = batch(), batch(mask_from=6)
    one, two = measure_importance(bert, [first, second]), measure_importance(bert, [second, first])
    assert torch.allclose(one.neurons[0], two.neurons[0])


def test_a_layer_that_changes_nothing_has_no_influence(make_model):
    student = load_student(make_model("vit"), auto_class="AutoModelForImageClassification")
    layer = student.family.layers(student.model)[1]
    for module in (layer.attention.output.dense, layer.output.dense):
        module.weight.data.zero_()
        module.bias.data.zero_()
    scores = measure_importance(student, [{"pixel_values": torch.randn(2, 1, 8, 8)}])
    assert scores.layers[1].abs() < 1e-6
    assert scores.layers[0] > 1e-3


def test_resnet_scores_its_inner_channels(make_model):
    student = load_student(make_model("resnet"), auto_class="AutoModelForImageClassification")
    scores = measure_importance(student, [{"pixel_values": torch.randn(2, 1, 8, 8)}])
    assert [len(each) for each in scores.neurons] == [layer.neurons for layer in student.arch.layers]
    assert all(len(each) == 0 for each in scores.heads)


def test_top_keeps_the_original_order():
    assert top(torch.tensor([0.1, 5.0, 3.0, 4.0]), 2).tolist() == [1, 3]
