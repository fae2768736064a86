"""Losses on attention and on image features: the right tensors of the right layers, or a refusal that helps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.context import Silent
from edgekd.distill import Distill
from edgekd.distill.cache import cached
from edgekd.distill.objective import Objective, _Inputs
from edgekd.distill.recover import fit
from edgekd.distill.signals import observe
from edgekd.distill.teachers import fingerprint, live
from edgekd.distill.terms import parse_terms
from edgekd.distill.wiring import Wiring, wire
from edgekd.errors import RecipeError
from edgekd.families.compact import install
from edgekd.student import Student, load_student
from edgekd.supernet import Supernet

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "fp32"}


@pytest.fixture
def load(make_model: Any) -> Any:
    def load(kind: str) -> Student:
        side = "Image" if kind in ("vit", "deit", "resnet") else "Sequence"
        return load_student(make_model(kind), auto_class=f"AutoModelFor{side}Classification")

    return load


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind in ("vit", "deit", "resnet"):
        side = 64 if kind == "resnet" else 8
        return {"pixel_values": torch.randn(3, 1, side, side, generator=generator)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0
    return {"input_ids": torch.randint(5, 40, (3, 9), generator=generator) * mask, "attention_mask": mask}


def noisy(student: Student, seed: int = 3) -> Student:
    model, generator = copy.deepcopy(student.model), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student.with_model(model)


def changed(student: Student, changes: list[dict[str, Any]]) -> Student:
    model = copy.deepcopy(student.model)
    layers = [replace(layer, **new) for layer, new in zip(student.arch.layers, changes, strict=True)]
    install(model, student.family, layers)
    return student.with_model(model)


def connect(student: Student, teacher: Student, batch: Any, losses: Any) -> tuple[Wiring, Objective]:
    terms = parse_terms(losses)
    wiring = wire(student, teacher, terms, batch=batch, layer_map="even")
    source = live(teacher.model, **wiring.of("teacher"))
    labels = torch.full((99,), -1)
    return wiring, Objective(model=student.model, terms=terms, wiring=wiring, teacher=source, labels=labels)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "vit", "deit"])
def test_maps_are_those_that_eager_attention_shows(load: Any, kind: str, implementation: str) -> None:
    model, batch = load(kind).model, batch_of(kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch, output_attentions=True)
        model.set_attn_implementation(implementation)
        found = observe(model, batch, hidden=(), maps=(1, 3))
    assert set(found.maps) == {1, 3}
    for number, probabilities in found.maps.items():
        torch.testing.assert_close(probabilities, expected.attentions[number - 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)


def test_outputs_follow_attention_residual_and_normalization(load: Any) -> None:
    model, batch = load("bert").model, batch_of("bert")
    layer, mask = model.bert.encoder.layer[1], batch["attention_mask"].bool()
    with torch.no_grad():
        found = observe(model, batch, hidden=(1, 2), outputs=(2,))
        # The rest of the layer brings the output to the next hidden state.
        after = layer.output(layer.intermediate(found.outputs[2]), found.outputs[2])
    torch.testing.assert_close(after, found.hidden[2])
    assert len(found.outputs[2]) == int(mask.sum())
    vit, pixels = load("vit").model, batch_of("vit")
    layer = vit.vit.encoder.layer[0]
    with torch.no_grad():
        found = observe(vit, pixels, hidden=(0,), outputs=(1,))
        first = found.hidden[0].view(3, -1, 32)
        after = layer.layernorm_after(layer.attention(layer.layernorm_before(first)) + first)
    torch.testing.assert_close(found.outputs[1], after.flatten(0, 1))


@pytest.mark.parametrize(("kind", "special"), [("vit", 1), ("deit", 2)])
def test_features_of_transformers_are_patches_alone(load: Any, kind: str, special: int) -> None:
    model, batch = load(kind).model, batch_of(kind)
    with torch.no_grad():
        found = observe(model, batch, hidden=(), features=(2,))
        states = model(**batch, output_hidden_states=True).hidden_states[2]
    assert states.shape[1] == 4 + special
    torch.testing.assert_close(found.features[2], states[:, special:])


def test_losses_are_zero_for_a_copy_and_not_for_another(load: Any) -> None:
    names = ("attention_kl", "attention_output_mse", "raw_hidden_mse")
    cases = [("bert", name) for name in names] + [("vit", name) for name in (*names, "feature_affinity")]
    for kind, name in [*cases, ("resnet", "feature_affinity"), ("resnet", "feature_affinity_fast")]:
        teacher, batch = load(kind), batch_of(kind)
        for student, same in ((teacher.with_model(copy.deepcopy(teacher.model)), True), (noisy(teacher), False)):
            _, objective = connect(student, teacher, batch, {name: 1.0})
            value = objective(batch, np.arange(3))
            assert (float(value.detach()) < 1e-6) is same, (kind, name)


def test_raw_hidden_states_hold_the_embeddings(load: Any) -> None:
    teacher, batch = load("bert"), batch_of("bert")
    student = teacher.with_model(copy.deepcopy(teacher.model))
    student.model.bert.embeddings.LayerNorm.bias.data.add_(1.0)
    wiring, objective = connect(student, teacher, batch, {"raw_hidden_mse": 1.0})
    assert wiring.entry
    with torch.no_grad():
        value = objective(batch, np.arange(3))
        ours, theirs = (observe(s.model, batch, hidden=(0, 1, 2, 3)).hidden for s in (student, teacher))
    expected = sum((ours[i] - theirs[i]).square().mean() for i in range(4))
    torch.testing.assert_close(value, expected)
    assert (ours[0] - theirs[0]).square().mean() > 0.9


@pytest.mark.parametrize(
    "changes", [[{}, {"tokens": 4}, {}], [{"tokens": 5}, {}, {"tokens": 1}], [{}, {"shares": True}, {}]]
)
def test_attention_outputs_are_compared_at_the_tokens_that_are_left(load: Any, changes: Any) -> None:
    teacher, batch = load("bert"), batch_of("bert")
    student = changed(noisy(teacher), changes)
    wiring, objective = connect(student, teacher, batch, {"attention_output_mse": 1.0})
    assert wiring.outputs == ((1, 1), (2, 2), (3, 3))
    objective(batch, np.arange(3)).backward()
    twin = changed(teacher, [{} if "shares" in each else each for each in changes])
    value = connect(twin, teacher, batch, {"attention_output_mse": 1.0})[1](batch, np.arange(3))
    # The layer that drops tokens still has the teacher's attention; those after it do not see them all.
    first = next((i for i, each in enumerate(changes) if "tokens" in each), None)
    if first is not None:
        with torch.no_grad():
            ours = observe(twin.model, batch, hidden=(), outputs=(first + 1,))
            theirs = observe(teacher.model, batch, hidden=(), outputs=(first + 1,))
        rows = theirs.outputs[first + 1][ours.kept[first + 1].rows]
        torch.testing.assert_close(ours.outputs[first + 1], rows, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(value)


def test_other_widths_are_bridged_and_teachers_maps_resized(narrow_text: Any, resnet: Any) -> None:
    stage = Distill(losses={"attention_output_mse": 1, "raw_hidden_mse": 1}, **QUICK)
    trained = stage.run(narrow_text.student, narrow_text.ctx)
    assert set(trained.model.state_dict()) == set(narrow_text.student.model.state_dict())
    stage = Distill(losses={"feature_affinity": 0.1, "feature_affinity_fast": 0.1, "mse": 1}, **QUICK)
    trained = stage.run(resnet.student, resnet.ctx)
    assert fingerprint(trained.model) != fingerprint(resnet.student.model)
    batch = {"pixel_values": torch.randn(2, 1, 8, 8)}
    _, objective = connect(resnet.student, resnet.ctx.teacher, batch, {"feature_affinity": 1.0})
    pairs, large = objective.wiring.features, torch.rand(2, 3, 8, 8)
    ours = observe(resnet.student.model, batch, hidden=(), features=[s for s, _ in pairs])
    ours = replace(ours, features={s: torch.rand(2, each.shape[1], 4, 4) for s, each in ours.features.items()})
    theirs = replace(ours, features={t: large for _, t in pairs})
    student, teacher = _Inputs(objective, ours, theirs, batch, np.arange(2)).features()
    assert [s.shape[1] for s in student] == [t.shape[1] for t in teacher] == [16] * len(pairs)
    halved = torch.nn.functional.interpolate(large, (4, 4), mode="bilinear")
    torch.testing.assert_close(teacher[0], halved.flatten(2).transpose(1, 2))


REFUSALS = [
    ("resnet", {}, "attention_kl", "a resnet student has none; use feature_affinity"),
    ("resnet", {}, "attention_output_mse", "use feature_affinity"),
    ("bert", {}, "feature_affinity", "compares positions of images"),
    ("bert", [{}, {"shares": True}, {}], "attention_kl", "use attention_output_mse"),
    ("bert", [{}, {}, {"tokens": 1}], "attention_kl", "use attention_output_mse"),
    ("vit", [{}, {"tokens": 3}, {}], "feature_affinity", "drop some; use attention_output_mse"),
]


@pytest.mark.parametrize(("kind", "changes", "name", "words"), REFUSALS)
def test_what_cannot_be_compared_is_refused_with_what_can(
    load: Any, kind: str, changes: Any, name: str, words: str
) -> None:
    teacher, batch = load(kind), batch_of(kind)
    student = changed(teacher, changes) if changes else teacher
    with pytest.raises(RecipeError, match=words):
        connect(student, teacher, batch, {name: 1.0})


def test_a_supernet_refuses_what_its_parts_cannot_show(text: Any) -> None:
    with pytest.raises(RecipeError, match="use hidden_mse"):
        Supernet(losses={"attention_output_mse": 1}, epochs=1).run(text.ctx.teacher, text.ctx)


def test_maps_need_equal_heads(load: Any) -> None:
    teacher, batch = load("bert"), batch_of("bert")
    model = copy.deepcopy(teacher.model)
    teacher.family.slice_heads(teacher.family.layers(model)[0], torch.tensor([0, 2]), 8)
    with pytest.raises(RecipeError, match="equal heads"):
        connect(teacher.with_model(model), teacher, batch, {"attention_kl": 1.0})


def test_the_cache_keeps_attention_outputs(text: Any) -> None:
    data, teacher = text.ctx.train, text.ctx.teacher.model
    given = {"hidden": (2,), "outputs": (1, 4)}
    source = cached(teacher, data, folder=text.ctx.cache, device=torch.device("cpu"), progress=Silent(), **given)
    indices = np.array([5, 1, 30])
    batch = {name: tensor for name, tensor in data.collate(indices).items() if name != "labels"}
    expected, found = live(teacher, **given)(indices, batch), source(indices, batch)
    for number in (1, 4):
        torch.testing.assert_close(found.outputs[number].float(), expected.outputs[number], atol=2e-3, rtol=2e-3)
    results = []
    for cache in (True, False):
        stage = Distill(losses={"attention_output_mse": 1}, cache=cache, **QUICK)
        results.append(stage.run(text.student, text.at(text.ctx.work / str(cache))).model.state_dict())
    assert len(list(text.ctx.cache.glob("teacher-*/output-*.npy"))) > 0
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-3) for name in results[0])


class Unlabelled:
    """Data whose labels must not be looked at."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        if name == "labels":
            raise AssertionError("somebody looked at labels")
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)


def test_losses_without_labels_never_touch_them(text: Any) -> None:
    ctx = replace(text.ctx, train=Unlabelled(text.ctx.train))
    student = replace(text.student, model=copy.deepcopy(text.student.model))
    losses = {"soft_cross_entropy": 1, "attention_kl": 1}
    ours = replace(ctx, teacher=text.ctx.teacher)
    outcome = fit(Distill(losses=losses, **QUICK), student, ours)
    assert outcome.steps == 3
    with pytest.raises(AssertionError, match="looked at labels"):
        fit(Distill(losses={"cross_entropy": 1}, **QUICK), student, ctx)
