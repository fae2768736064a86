from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from edgekd.errors import DataError, RecipeError
from edgekd.student import load_student
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.criteria import CRITERIA
from edgekd.surgery.gates import EXACT_CLASSES, gate_information, predictions
from edgekd.surgery.importance import top

ENCODERS = ("bert", "distilbert", "vit")


@pytest.fixture
def bert(make_model):
    return load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")


def load(make_model, kind: str):
    task = "Image" if kind in ("vit", "resnet", "resnet-bottleneck") else "Sequence"
    return load_student(make_model(kind), auto_class=f"AutoModelFor{task}Classification")


def batch(mask_from: int | None = None, rows: int = 16, length: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(rows, length, dtype=torch.long)
    if mask_from is not None:
        mask[:, mask_from:] = 0
    return {"input_ids": torch.randint(5, 40, (rows, length), generator=generator), "attention_mask": mask}


def inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind in ENCODERS and kind != "vit":
        return batch()
    return {"pixel_values": torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


def silence_neuron(student, layer: int, neuron: int) -> None:
    """Nothing comes out of this neuron, and its outgoing weights are like the others."""
    places, module = student.family.places, student.family.layers(student.model)[layer]
    up = module.get_submodule(places.up)
    up.weight.data[neuron], up.bias.data[neuron] = 0, 0


def silence_head(student, layer: int, head: int) -> None:
    value = student.family.qkv(student.family.layers(student.model)[layer])[2]
    features = slice(head * student.arch.head_dim, (head + 1) * student.arch.head_dim)
    value.weight.data[features], value.bias.data[features] = 0, 0


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_silent_neuron_and_a_silent_head_matter_least(make_model, kind, criterion):
    student = load(make_model, kind)
    for neuron in (5, 40):
        silence_neuron(student, 1, neuron)
    silence_head(student, 1, 1)
    scores = measure_importance(student, [inputs(kind)], criterion=criterion)
    assert set(torch.argsort(scores.neurons[1])[:2].tolist()) == {5, 40}
    assert int(scores.heads[1].argmin()) == 1
    assert [len(each) for each in scores.heads] == [4, 4, 4]
    assert [len(each) for each in scores.neurons] == [64, 64, 64]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "activation"])
def test_what_nobody_reads_matters_least(bert, criterion):
    layer = bert.family.layers(bert.model)[1]
    layer.output.dense.weight.data[:, 7] = 0
    layer.attention.output.dense.weight.data[:, 16:24] = 0
    scores = measure_importance(bert, [batch()], criterion=criterion)
    assert int(scores.neurons[1].argmin()) == 7
    assert int(scores.heads[1].argmin()) == 2


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "activation_weight", "fisher", "obs"])
@pytest.mark.parametrize("kind", ["resnet", "resnet-bottleneck"])
def test_resnet_scores_its_inner_channels(make_model, kind, criterion):
    student = load(make_model, kind)
    block = student.family.layers(student.model)[1]
    norm = block.layer[-2].normalization
    norm.weight.data[3], norm.bias.data[3] = 0, 0
    scores = measure_importance(student, [inputs(kind)], criterion=criterion)
    assert [len(each) for each in scores.neurons] == [layer.neurons for layer in student.arch.layers]
    assert int(scores.neurons[1].argmin()) == 3
    assert all(len(each) == 0 for each in scores.heads)
    assert scores.hidden is None


@pytest.mark.parametrize("criterion", CRITERIA)
def test_padding_does_not_count(bert, criterion):
    padded, other, short = batch(mask_from=5), batch(mask_from=5), batch()
    other["input_ids"][:, 5:] = 3
    short = {name: values[:, :5] for name, values in short.items()}
    one = measure_importance(bert, [padded], criterion=criterion)
    for again in (other, short):
        two = measure_importance(bert, [again], criterion=criterion)
        for first, second in zip((*one.neurons, *one.heads), (*two.neurons, *two.heads), strict=True):
            assert torch.allclose(first, second, rtol=1e-3, atol=1e-5)
        assert torch.allclose(one.layers, two.layers, atol=1e-5)
        assert torch.allclose(one.hidden, two.hidden, atol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_batches_add_up_whatever_their_order(bert, criterion):
    first, second = batch(), batch(mask_from=6, rows=8)
    one = measure_importance(bert, [first, second], criterion=criterion)
    two = measure_importance(bert, [second, first], criterion=criterion)
    assert torch.allclose(one.neurons[0], two.neurons[0], rtol=1e-4)
    assert torch.allclose(one.heads[2], two.heads[2], rtol=1e-4)


def test_a_layer_that_changes_nothing_has_no_influence(make_model):
    student = load(make_model, "vit")
    layer = student.family.layers(student.model)[1]
    for module in (layer.attention.output.dense, layer.output.dense):
        module.weight.data.zero_()
        module.bias.data.zero_()
    scores = measure_importance(student, [inputs("vit")])
    assert scores.layers[1].abs() < 1e-6
    assert scores.layers[0] > 1e-3


def test_hidden_channels_are_scored_by_what_the_norms_give(bert):
    for layer in bert.family.layers(bert.model):
        for path in bert.family.norms(layer):
            norm = layer.get_submodule(path)
            norm.weight.data[9], norm.bias.data[9] = 0, 0
            norm.weight.data[4] = 30.0
    scores = measure_importance(bert, [batch()])
    assert scores.hidden.shape == (32,)
    assert int(scores.hidden.argmin()) == 9
    assert scores.hidden[9] == 0
    assert int(scores.hidden.argmax()) == 4


def test_hidden_scores_are_sums_over_norms_of_norms_over_samples_of_means(bert):
    given, seen = batch(mask_from=6), []
    layers = bert.family.layers(bert.model)
    for layer in layers:
        for path in bert.family.norms(layer):
            layer.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    found = measure_importance(bert, [given]).hidden
    wanted = sum(each[:, :6].abs().mean(1).square().sum(0).sqrt() for each in seen)
    assert len(seen) == 2 * len(layers)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_fisher_follows_the_loss_that_is_given(bert):
    layer = bert.family.layers(bert.model)[2]
    gate_on = layer.output.dense.weight[:, 11].detach()

    def loss(model, given):
        """A loss that looks at one neuron of the last layer alone."""
        seen = []
        handle = layer.output.dense.register_forward_hook(lambda m, i, o: seen.append(i[0]))
        model(**given)
        handle.remove()
        return seen[0][:, 0, 11] * gate_on.norm()

    scores = measure_importance(bert, [batch()], criterion="fisher", loss=loss)
    assert int(scores.neurons[2].argmax()) == 11
    assert int((scores.neurons[2] > 0).sum()) == 1


def test_fisher_is_the_curvature_of_the_divergence_from_itself(bert):
    """Half the second difference of KL(p ‖ p with a gate moved) is half the Fisher information."""
    given = batch(rows=4)
    found = gate_information(bert, [given], None)[2][1]
    layer, step = bert.family.layers(bert.model)[2], 0.05
    bert.model.eval()
    with torch.no_grad():
        base = bert.model(**given).logits.double().log_softmax(-1)
        neuron = int(found.argmax())
        total = 0.0
        for sign in (1, -1):

            def scale(module, values, sign=sign):
                moved = values[0].clone()
                moved[..., neuron] *= 1 + sign * step
                return (moved,)

            handle = layer.output.dense.register_forward_pre_hook(scale)
            moved = bert.model(**given).logits.double().log_softmax(-1)
            handle.remove()
            total += float(functional.kl_div(moved, base, log_target=True, reduction="sum"))
    assert total / step**2 == pytest.approx(float(found[neuron]), rel=0.05)


def test_random_signs_estimate_the_same_information():
    logits = torch.randn(400, EXACT_CLASSES + 3, generator=torch.Generator().manual_seed(0))
    moving = logits.clone().requires_grad_()
    probabilities = logits.softmax(-1)
    wanted = probabilities * (1 - probabilities)  # the diagonal of diag(p) - p pᵀ
    found = sum(torch.autograd.grad(value, moving, retain_graph=True)[0].square() for value in predictions(moving))
    assert torch.allclose(found.mean(0), wanted.mean(0), rtol=0.25)
    few = logits[:, :3].clone().requires_grad_()
    exact = sum(torch.autograd.grad(value, few, retain_graph=True)[0].square() for value in predictions(few))
    own = few.detach().softmax(-1)
    assert torch.allclose(exact, own * (1 - own), atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_ordered_student_is_cut_to_its_prefix_without_data(bert, criterion):
    ordered = replace(bert, ordered=True)
    scores = measure_importance(ordered, (), criterion=criterion)
    layers = tuple(replace(layer, heads=2, neurons=24) for layer in bert.arch.layers)
    small = cut(ordered, replace(bert.arch, layers=layers), scores).model.base_model.encoder.layer[1]
    whole = bert.model.base_model.encoder.layer[1]
    assert torch.equal(small.intermediate.dense.weight, whole.intermediate.dense.weight[:24])
    assert torch.equal(small.output.dense.weight, whole.output.dense.weight[:, :24])
    assert torch.equal(small.attention.self.value.weight, whole.attention.self.value.weight[:16])
    assert scores.hidden is None


def test_mistakes_are_told(bert):
    with pytest.raises(RecipeError, match="unknown criterion 'fischer' .did you mean 'fisher'"):
        measure_importance(bert, [batch()], criterion="fischer")
    with pytest.raises(DataError, match="give at least one"):
        measure_importance(bert, [])


def test_scoring_leaves_the_model_as_it_was(bert):
    before = {name: value.clone() for name, value in bert.model.state_dict().items()}
    for criterion in CRITERIA:
        measure_importance(bert, [batch()], criterion=criterion)
    assert all(torch.equal(value, before[name]) for name, value in bert.model.state_dict().items())
    assert all(parameter.grad is None for parameter in bert.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bert.model.modules())


def test_top_keeps_the_original_order():
    assert top(torch.tensor([0.1, 5.0, 3.0, 4.0]), 2).tolist() == [1, 3]
