"""Laws of the operators: what is exact stays exact, what is dropped is dropped, and a model can be saved and copied."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from edgekd.arch import Layer
from edgekd.errors import ModelError
from edgekd.families import arch_of
from edgekd.families.compact import install, kept_tokens, read
from edgekd.families.compact_flow import most_attended
from edgekd.families.compact_norm import Affine
from edgekd.families.compact_rank import LowRank, factorise, pays
from edgekd.student import Student, load_student

TEXT = ["bert", "roberta", "electra", "distilbert"]
KINDS = [*TEXT, "vit", "deit"]
EXACT = 2e-6


@pytest.fixture
def student(make_model):
    def make(kind: str) -> Student:
        side = "Sequence" if kind in TEXT else "Image"
        return load_student(make_model(kind), auto_class=f"AutoModelFor{side}Classification")

    return make


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind not in TEXT:
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0
    return {"input_ids": torch.randint(5, 40, (3, 9), generator=generator) * mask, "attention_mask": mask}


@torch.no_grad()
def run(model, **batch):
    return model.eval()(**batch, output_hidden_states=True)


def installed(student: Student, *changes: dict) -> nn.Module:
    """A copy of the model with these changes to its layers."""
    model = copy.deepcopy(student.model)
    install(model, student.family, changed(student, *changes))
    return model


def changed(student: Student, *changes: dict) -> list[Layer]:
    return [replace(layer, **change) for layer, change in zip(student.arch.layers, changes, strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_alone_says_the_same(student, kind, attention):
    own = student(kind)
    if kind != "electra":
        own.model.set_attn_implementation(attention)
    full, first = run(own.model, **inputs(kind)), run(installed(own, {}, {}, {"tokens": 1}), **inputs(kind))
    torch.testing.assert_close(first.logits, full.logits, atol=EXACT, rtol=0)
    assert [state.shape[1] for state in first.hidden_states] == [full.hidden_states[0].shape[1]] * 3 + [1]
    torch.testing.assert_close(first.hidden_states[3], full.hidden_states[3][:, :1], atol=EXACT, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_as_many_tokens_as_there_are_changes_nothing(student, kind):
    own = student(kind)
    full, kept = run(own.model, **inputs(kind)), run(installed(own, {"tokens": 20}, {"tokens": 12}, {}), **inputs(kind))
    torch.testing.assert_close(kept.logits, full.logits, atol=EXACT, rtol=0)
    real = inputs(kind).get("attention_mask", torch.ones(full.hidden_states[0].shape[:2])).bool()
    for ours, theirs in zip(kept.hidden_states, full.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=EXACT, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_dropped_by_the_attention_they_get(student, kind):
    own = student(kind)
    model = installed(own, {}, {"tokens": 4}, {"tokens": 3})
    states = run(model, **inputs(kind)).hidden_states
    assert [state.shape[1] for state in states[1:]] == [states[0].shape[1], 4, 3]
    assert kept_tokens(model, 1) is None
    second, last = kept_tokens(model, 2), kept_tokens(model, 3)
    assert (second[:, 0] == 0).all()
    assert (second.diff() > 0).all()
    assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(second, last, strict=True))
    if kind in TEXT:
        mask = inputs(kind)["attention_mask"]
        # The text of five words fills four places with real ones, that of three has one place left over.
        assert mask.gather(1, second).sum(-1).tolist() == [4, 4, 3]


@pytest.mark.parametrize("kind", TEXT)
def test_padding_does_not_change_which_tokens_stay(student, kind):
    model, batch = installed(student(kind), {"tokens": 4}, {}, {"tokens": 2}), inputs(kind)
    together = run(model, **batch).logits
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        alone = run(model, **{name: value[row : row + 1, :length] for name, value in batch.items()}).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=EXACT, rtol=0)


def test_attention_received_is_summed_over_heads_and_real_queries():
    probabilities = torch.zeros(1, 2, 4, 4)
    probabilities[0, 0, :2, 1], probabilities[0, 1, :2, 2] = 0.4, 0.3
    probabilities[0, :, 2:, 2] = 9.0
    mask = torch.tensor([[1, 1, 1, 0]])
    assert most_attended(probabilities, None, 2).tolist() == [[0, 2]]
    assert most_attended(probabilities[:, :, :, :], torch.tensor([[1, 1, 0, 0]]), 2).tolist() == [[0, 1]]
    probabilities[0, :, :, 3] = 99.0
    for form in (mask, (mask == 1)[:, None, None, :], ((1.0 - mask) * -1e30)[:, None, None, :].expand(1, 1, 4, 4)):
        assert most_attended(probabilities, form, 2).tolist() == [[0, 2]]
        assert most_attended(probabilities, form, 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_sharing_attention_of_twin_layers_changes_nothing(student, kind):
    own = student(kind)
    layers = own.family.layers(own.model)
    twin = copy.deepcopy(layers[0])
    # The value projection of the first layer is 0 and so is the rest of it: both layers see the same states.
    for path in (own.family.places.attention_output, own.family.places.down):
        for parameter in layers[0].get_submodule(path).parameters():
            parameter.data.zero_()
    if kind not in ("vit", "deit"):
        for path in own.family.norms(layers[0]):
            norm = layers[0].get_submodule(path)
            norm.weight.data.fill_(1.0), norm.bias.data.zero_()
        embeddings = next(m for m in own.model.base_model.embeddings.modules() if isinstance(m, nn.LayerNorm))
        embeddings.weight.data.fill_(1.0), embeddings.bias.data.zero_()
        if kind == "electra":  # a projection after the norm
            own.model.base_model.embeddings_project = Normalized(own.model.base_model.embeddings_project)
    own.family.layers(own.model)[1].load_state_dict(twin.state_dict())
    full = run(own.model, **inputs(kind))
    shared = installed(own, {}, {"shares": True}, {})
    torch.testing.assert_close(run(shared, **inputs(kind)).logits, full.logits, atol=5e-6, rtol=0)
    gone = own.model.state_dict().keys() - shared.state_dict().keys()
    assert len(gone) == 4
    assert shared.state_dict().keys() < own.model.state_dict().keys()


class Normalized(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.inner(states)
        return nn.functional.layer_norm(states, states.shape[-1:])


@pytest.mark.parametrize("kind", KINDS)
def test_shared_attention_is_that_of_the_layer_before(student, kind):
    own = student(kind)
    shared = installed(own, {}, {"shares": True}, {"shares": True})
    before = run(shared, **inputs(kind)).logits
    query = own.family.layers(shared)[0].get_submodule(own.family.places.attention)
    getattr(query, own.family.places.qkv[0]).weight.data.mul_(3.0)
    assert not torch.allclose(run(shared, **inputs(kind)).logits, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_factors_compute_the_same(student, kind):
    own = student(kind)
    layer = own.family.layers(own.model)[0]
    up = layer.get_submodule(own.family.places.up)
    states = torch.randn(2, 5, up.in_features)
    factored = factorise(up, min(up.in_features, up.out_features))
    torch.testing.assert_close(factored(states), up(states), atol=1e-5, rtol=0)
    kept = torch.tensor([3, 0, 7])
    torch.testing.assert_close(factored.rows(kept)(states), up(states)[..., kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(factored.columns(kept).weight, up.weight[:, kept], atol=1e-5, rtol=0)
    assert (factored.in_features, factored.out_features) == (up.in_features, up.out_features)
    torch.testing.assert_close(factored.dense()(states), up(states), atol=1e-5, rtol=0)


def test_factors_are_the_best_for_what_is_read():
    torch.manual_seed(0)
    linear = nn.Linear(12, 10)
    rows = torch.randn(400, 12) * torch.linspace(0.05, 3.0, 12)
    plain, aware = factorise(linear, 4), factorise(linear, 4, rows.T @ rows / len(rows))

    def error(module: nn.Module) -> float:
        return float((module(rows) - linear(rows)).detach().square().mean())

    left, sizes, right = torch.linalg.svd(linear.weight)
    torch.testing.assert_close(plain.weight, left[:, :4] * sizes[:4] @ right[:4], atol=1e-5, rtol=0)
    assert error(aware) < 0.9 * error(plain)
    torch.testing.assert_close(plain.second.weight.norm(dim=0), plain.first.weight.norm(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_that_get_smaller_are_factored(student, kind):
    own = student(kind)
    model = installed(own, {"rank": 18}, {}, {"rank": 999})
    first, second, third = own.family.layers(model)
    found = {name.rsplit(".", 1)[-1] for name, m in first.named_modules() if isinstance(m, LowRank)}
    # 18 · (32 + 32) is more than 32 · 32, but 18 · (32 + 64) is less than 32 · 64.
    assert found == {path.rsplit(".", 1)[-1] for path in (own.family.places.up, own.family.places.down)}
    assert not any(isinstance(module, LowRank) for layer in (second, third) for module in layer.modules())
    assert [read(layer) for layer in (first, second, third)] == [{"rank": 18}, {}, {"rank": 999}]
    assert [pays(nn.Linear(32, 32), rank) for rank in (0, 15, 16)] == [False, True, False]
    install(model, own.family, changed(own, {}, {}, {}))
    assert not any(isinstance(module, LowRank) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_and_norm(student, kind):
    own, batch = student(kind), inputs(kind)
    before = run(own.model, **batch).logits
    swapped = installed(own, {"activation": "relu"}, {"activation": "quick_gelu"}, {})
    seen: list[torch.Tensor] = []
    down = own.family.neuron_input(own.family.layers(swapped)[0])
    down.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    assert not torch.allclose(run(swapped, **batch).logits, before, atol=1e-4)
    assert (seen[0] >= 0).all()
    install(swapped, own.family, changed(own, {}, {}, {}))
    torch.testing.assert_close(run(swapped, **batch).logits, before)
    plain = installed(own, {"norm": "affine"}, {"norm": "affine"}, {})
    affine = [name for name, module in plain.named_modules() if isinstance(module, Affine)]
    assert len(affine) == 4
    assert plain.state_dict().keys() == own.model.state_dict().keys()
    norm = plain.get_submodule(affine[0])
    states = torch.randn(2, 3, 32)
    torch.testing.assert_close(norm(states), states * norm.weight + norm.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_layers_stay_those_of_transformers(student, kind):
    own = student(kind)
    classes = [type(layer) for layer in own.family.layers(own.model)]
    model = installed(own, {}, {}, {"tokens": 1})
    assert [type(layer) for layer in own.family.layers(model)][:2] == classes[:2]
    assert isinstance(own.family.layers(model)[2], classes[2])
    install(model, own.family, own.arch.layers)
    assert [type(layer) for layer in own.family.layers(model)] == classes
    untouched = installed(own, {}, {}, {})
    assert [type(layer) for layer in own.family.layers(untouched)] == classes


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_shown_hidden_states_can_be_changed(student, kind):
    own = student(kind)
    run(own.model, **inputs(kind))
    model = installed(own, {"tokens": 3}, {}, {})
    assert run(model, **inputs(kind)).hidden_states[1].shape[1] == 3
    assert own.model(**inputs(kind), output_hidden_states=True).hidden_states[1].shape[1] > 3


@pytest.mark.parametrize("kind", KINDS)
def test_copies_do_not_disturb_each_other(student, kind):
    own = student(kind)
    model = installed(own, {"tokens": 4}, {"tokens": 3}, {})
    model(**inputs(kind)).logits.sum().backward()
    twin = copy.deepcopy(model)
    batch = {name: value[:1, :4] if name != "pixel_values" else value[:1] for name, value in inputs(kind).items()}
    before = kept_tokens(model, 2).clone()
    run(twin, **batch)
    assert kept_tokens(twin, 2).shape == (1, 3)
    assert torch.equal(kept_tokens(model, 2), before)
    own.family.neuron_input(own.family.layers(twin)[0]).weight.data.add_(1.0)
    assert not torch.equal(run(twin, **inputs(kind)).logits, run(model, **inputs(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_at_once_is_saved_and_loaded(student, kind, tmp_path):
    own = student(kind)
    changes = (
        {"rank": 9, "activation": "relu"},
        {"shares": True, "tokens": 4, "norm": "affine"},
        {"tokens": 1, "rank": 20},
    )
    model = installed(own, *changes)
    made = own.with_model(model)
    assert made.arch.layers == tuple(changed(own, *changes))
    made.save(tmp_path / "student")
    side = "Sequence" if kind in TEXT else "Image"
    loaded = load_student(tmp_path / "student", auto_class=f"AutoModelFor{side}Classification")
    assert loaded.arch == made.arch
    assert torch.equal(run(loaded.model, **inputs(kind)).logits, run(model, **inputs(kind)).logits)
    again = copy.deepcopy(loaded.model)
    install(again, own.family, made.arch.layers)
    assert torch.equal(run(again, **inputs(kind)).logits, run(model, **inputs(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_weight_and_drops_attention(student, kind):
    own = student(kind)
    model = installed(own, {"rank": 9}, {"shares": True, "tokens": 4}, {"tokens": 1, "norm": "affine"}).train()
    for module in model.modules():
        for name in ("p", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model(**inputs(kind)).logits.sum().backward()
    inner = [p for layer in own.family.layers(model) for p in layer.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in inner)
    assert torch.equal(model(**inputs(kind)).logits, model(**inputs(kind)).logits)
    attention = own.family.layers(model)[1].get_submodule(own.family.places.attention)
    if hasattr(attention, "dropout_prob"):
        attention.dropout_prob = 0.5
    else:
        attention.dropout.p = 0.5
    assert not torch.equal(model(**inputs(kind)).logits, model(**inputs(kind)).logits)
    assert torch.equal(run(model, **inputs(kind)).logits, run(model, **inputs(kind)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_shown_where_it_is_asked_for(student, kind):
    own = student(kind)
    if kind in ("vit", "deit"):
        pytest.skip("transformers records these from its own attention modules")
    model = installed(own, {"tokens": 4}, {}, {"tokens": 1})
    output = model.eval()(**inputs(kind), output_attentions=True)
    assert [tuple(part.shape[-2:]) for part in output.attentions] == [(9, 9), (4, 4), (1, 4)]
    torch.testing.assert_close(output.logits, run(model, **inputs(kind)).logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (({}, {"tokens": 1}, {}), "one is for the last layer"),
        (({"tokens": 3}, {"tokens": 5}, {}), "only 3 reach it"),
        (({"shares": True}, {}, {}), "no layer before"),
        (({"tokens": 3}, {"shares": True}, {}), "drops tokens"),
        (({"activation": "rellu"}, {}, {}), "relu"),
        (({"norm": "none"}, {}, {}), "affine"),
    ],
)
def test_what_cannot_be_is_refused(student, changes, said):
    own = student("bert")
    with pytest.raises(ModelError, match=said):
        installed(own, *changes)


def test_sharing_needs_as_many_heads_and_what_is_gone_does_not_come_back(student):
    own = student("bert")
    model = copy.deepcopy(own.model)
    own.family.slice_heads(own.family.layers(model)[1], torch.tensor([0, 2]), 8)
    with pytest.raises(ModelError, match="heads"):
        install(model, own.family, changed(own, {}, {"shares": True}, {}))
    shared = installed(own, {}, {"shares": True}, {"norm": "affine"})
    with pytest.raises(ModelError, match="query and key"):
        install(shared, own.family, changed(own, {}, {}, {"norm": "affine"}))
    with pytest.raises(ModelError, match="LayerNorm"):
        install(shared, own.family, changed(own, {}, {"shares": True}, {}))
    with pytest.raises(ModelError, match="3"):
        install(shared, own.family, own.arch.layers[:2])


def test_other_heads_and_families_are_refused(make_model):
    import transformers as t

    model = t.AutoModelForTokenClassification.from_pretrained(make_model("bert"))
    arch = arch_of(model)
    layers = [*arch.layers[:-1], replace(arch.layers[-1], tokens=1)]
    own = load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")
    with pytest.raises(ModelError, match="first one"):
        install(model, own.family, layers)
    resnet = load_student(make_model("resnet"), auto_class="AutoModelForImageClassification")
    with pytest.raises(ModelError, match="resnet"):
        install(resnet.model, resnet.family, [replace(layer, activation="relu") for layer in resnet.arch.layers])
