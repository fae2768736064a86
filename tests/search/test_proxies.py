"""Proxies prefer shapes that keep more of the teacher, repeat with a seed, and do shared work once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec
from edgekd.errors import ModelError
from edgekd.pipeline.setup import prepare
from edgekd.search.proxies import PROXIES, ProxyContext, gather
from edgekd.search.proxies.activation import activation
from edgekd.search.proxies.diswot import (
    SEEDS,
    class_distance,
    classifier,
    diswot,
    feature_distance,
    look,
    randomized,
    relations,
)
from edgekd.search.proxies.fisher import fisher
from edgekd.search.proxies.kl import kl
from edgekd.student import load_student
from edgekd.surgery import Importance, cut, measure_importance
from edgekd.surgery.importance import top
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target

KINDS = ["bert", "vit", "resnet"]
TASKS = {"bert": "AutoModelForSequenceClassification"}
COUNT = 16


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    return one_thread


def inputs(kind: str, batches: int = 2):
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(2, (COUNT,), generator=generator) for _ in range(batches)]
    for given in labels:
        given[:2] = torch.tensor([0, 1])
    if kind != "bert":
        side = 8 if kind == "vit" else 16
        return [{"pixel_values": torch.randn(COUNT, 1, side, side, generator=generator)} for _ in labels], labels
    mask = torch.ones(COUNT, 8, dtype=torch.int64)
    mask[::3, 5:] = 0
    ids = [torch.randint(5, 45, (COUNT, 8), generator=generator) for _ in labels]
    return [{"input_ids": one * mask, "attention_mask": mask} for one in ids], labels


@pytest.fixture
def make(make_model):
    def made(kind: str, seed: int = 0) -> ProxyContext:
        auto = TASKS.get(kind, "AutoModelForImageClassification")
        student, teacher = (load_student(make_model(kind), auto_class=auto) for _ in range(2))
        batches, labels = inputs(kind)
        importance = measure_importance(student, batches)
        return ProxyContext(
            student=student, teacher=teacher, importance=importance, batches=batches, labels=labels, seed=seed
        )

    return made


def shapes(context: ProxyContext):
    """The full shape, a little less, and far less."""
    full = context.student.arch
    few = replace(full, layers=(replace(full.layers[0], neurons=full.layers[0].neurons * 7 // 8), *full.layers[1:]))
    model, family = context.student.model, context.student.family
    kept = [layer for i, layer in enumerate(full.layers) if i != 1 or not family.droppable(model, i)]
    bad = replace(full, layers=tuple(replace(x, heads=min(x.heads, 1), neurons=max(x.neurons // 16, 1)) for x in kept))
    return full, few, bad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(PROXIES))
def test_the_full_shape_is_best_and_a_badly_cut_one_worst(make, name, kind):
    context = make(kind)
    score = PROXIES[name](context)
    full, few, bad = (score(shape) for shape in shapes(context))
    assert full == pytest.approx(0, abs=1e-5)
    assert full < few < bad


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_scores_repeat_and_leave_the_models_alone(make, name):
    context = make("resnet")
    before = {key: value.clone() for key, value in context.student.model.state_dict().items()}
    bad = shapes(context)[2]
    first = PROXIES[name](context)(bad)
    assert PROXIES[name](context)(bad) == first
    after = context.student.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not context.student.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in context.student.model.modules())


def test_diswot_depends_on_the_seed_and_does_not_see_trained_weights(make):
    context = make("bert")
    bad = shapes(context)[2]
    assert diswot(replace(context, seed=5))(bad) != diswot(context)(bad)
    twice = [make("bert") for _ in range(2)]
    for parameter in (*twice[1].teacher.model.parameters(), *twice[1].student.model.parameters()):
        parameter.data.mul_(3.0)
    assert diswot(twice[0])(bad) == diswot(twice[1])(bad)


def test_diswot_runs_the_teacher_once_for_each_seed(make):
    context = make("bert")
    calls = []
    context.teacher.model.register_forward_hook(lambda *_: calls.append("teacher"))
    context.student.model.register_forward_hook(lambda *_: calls.append("student"))
    score = diswot(context)
    for shape in shapes(context):
        score(shape)
    score(shapes(context)[2])
    assert calls.count("teacher") == SEEDS >= 3
    assert calls.count("student") == 3 * SEEDS


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "vit", "deit", "resnet-bottleneck"])
def test_the_gradient_of_the_classifier_is_that_of_autograd(make_model, kind):
    text = kind in ("bert", "roberta", "electra", "distilbert")
    auto = f"AutoModelFor{'Sequence' if text else 'Image'}Classification"
    batches, labels = inputs("bert" if text else "vit" if kind == "deit" or kind == "vit" else "resnet", batches=1)
    model = randomized(load_student(make_model(kind), auto_class=auto).model, 3)
    features, gradient = look(model, batches[0], labels[0])
    weight = classifier(model).weight
    loss = torch.nn.functional.cross_entropy(model(**batches[0]).logits, labels[0])
    assert torch.allclose(gradient, torch.autograd.grad(loss, weight)[0], rtol=1e-4, atol=1e-6)
    assert features.shape == (COUNT, weight.shape[1])
    assert torch.isfinite(features).all()
    # Random weights neither explode nor make all examples alike.
    assert features.std(0).mean() > 1e-2
    assert features.abs().max() < 1e3


def test_random_weights_are_as_the_paper_says(make):
    model = randomized(make("resnet").student.model, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(1, abs=0.25), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_random_weights_of_a_transformer_do_not_explode_with_width(make):
    model = randomized(make("vit").student.model, 0)
    layer = model.vit.encoder.layer[1]
    assert layer.intermediate.dense.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert layer.output.dense.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.vit.embeddings.patch_embeddings.projection.weight.std().item() == pytest.approx(16**-0.5, rel=0.2)
    assert model.vit.embeddings.position_embeddings.std().item() == pytest.approx(1, abs=0.2)
    words = randomized(make("bert").student.model, 0).bert.embeddings.word_embeddings.weight
    assert words.std().item() == pytest.approx(1, abs=0.1)


def test_relation_and_semantic_distances_by_hand():
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert relations(features).tolist() == [[1, 0], [0, 1]]
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    turned = gradient @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0]
    assert class_distance(turned, gradient).item() == pytest.approx(0, abs=1e-6)
    assert class_distance(gradient[:, :4], gradient) > 0.01
    assert class_distance(gradient[:2] * torch.tensor([[1.0], [-1.0]]), gradient[:2]) > 0


def test_the_distance_over_features_is_that_of_normalized_outer_products():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)

    def outer(gradient):
        return torch.nn.functional.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2)

    expected = (outer(student) - outer(teacher)).square().sum() / 24
    assert feature_distance(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ModelError, match="needs equal widths, not 5 and 6"):
        feature_distance(student[:, :5], teacher)


def test_two_classes_leave_nothing_to_the_distance_over_classes(make):
    context = make("bert")
    bad = shapes(context)[2]
    batch, labels = context.batches[0], context.labels[0]
    ours = look(cut(context.student, bad, context.importance).model, batch, labels)[1]
    theirs = look(context.teacher.model, batch, labels)[1]
    assert class_distance(ours, theirs).item() == pytest.approx(0, abs=1e-6)
    assert feature_distance(ours, theirs) > 0.01
    assert diswot(context, semantic="features")(bad) > diswot(context)(bad) + 0.01


def test_activation_by_hand(make):
    context = make("bert")
    importance = Importance(
        heads=tuple(torch.tensor([1.0, 2.0, 2.0, 4.0]) for _ in range(3)),
        neurons=tuple(torch.ones(64) for _ in range(3)),
        layers=torch.tensor([1.0, 2.0, 2.0]),
        hidden=torch.ones(32),
    )
    score = activation(replace(context, importance=importance))
    full = context.student.arch
    assert score(replace(full, layers=full.layers[:2])) == pytest.approx(4 / 9)
    two = replace(full.layers[0], heads=2, neurons=48)
    assert score(replace(full, layers=(two, *full.layers[1:]))) == pytest.approx(1 / 9 * (1 - (20 / 25 + 0.75) / 2))
    assert score(replace(full, hidden=24)) == pytest.approx(0.25)


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_a_narrower_residual_stream_is_not_free(make, name):
    context = make("bert")
    hidden = context.importance.hidden
    if hidden is None:
        context = replace(context, importance=replace(context.importance, hidden=torch.rand(32) + 0.1))
    score = PROXIES[name](context)
    assert score(replace(context.student.arch, hidden=8)) > score(context.student.arch) + 1e-4


@pytest.mark.parametrize("name", ["activation", "fisher"])
def test_narrower_stages_of_a_resnet_are_not_free(make, name):
    context = make("resnet")
    full = context.student.arch
    narrow = replace(full, channels=(*(c // 2 for c in full.channels[:-1]), full.channels[-1]))
    expected = 0.5 * (len(full.channels) - 1) / len(full.channels)
    assert PROXIES[name](context)(narrow) == pytest.approx(expected)


def test_nothing_is_run_for_activation(make):
    context = make("bert")
    context.student.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    assert activation(context)(shapes(context)[2]) > 0.1


def test_fisher_by_hand(make):
    """One gate closed loses its squared slope, as seen by moving it a little."""
    context = make("bert")
    context = replace(context, batches=context.batches[:1], labels=context.labels[:1])
    layers, model = context.student.family.layers(context.student.model.double()), context.student.model
    slopes = {}
    for place, count, width in (("neuron_input", 64, 1), ("head_input", 4, 8)):
        for i, layer in enumerate(layers):
            weight = getattr(context.student.family, place)(layer).weight
            slopes[place, i] = torch.stack(
                [slope(model, weight, slice(n * width, (n + 1) * width), context) for n in range(count)]
            )
    total = sum(float(part.square().sum()) for part in slopes.values())
    context.student.model.float()
    one = replace(context.student.arch.layers[2], neurons=3, heads=2)
    kept = float(slopes["neuron_input", 2][top(context.importance.neurons[2], 3)].square().sum())
    kept += float(slopes["head_input", 2][top(context.importance.heads[2], 2)].square().sum())
    shape = replace(context.student.arch, layers=(one,))
    assert fisher(context)(shape) == pytest.approx(1 - kept / total, rel=1e-2)


@torch.no_grad()
def slope(model, weight, columns, context):
    """Derivative of the loss of each example, `[B]`, by a factor on some columns."""
    kept, step, losses = weight.data[:, columns].clone(), 1e-3, []
    for factor in (1 + step, 1 - step):
        weight.data[:, columns] = kept * factor
        logits = model(**context.batches[0]).logits
        losses.append(torch.nn.functional.cross_entropy(logits, context.labels[0], reduction="none"))
    weight.data[:, columns] = kept
    return (losses[0] - losses[1]) / (2 * step)


@pytest.fixture
def ctx(make_model, text_data, tmp_path: Path) -> Context:
    setup = prepare(make_model("bert"), DataSpec(path=str(text_data)), progress=Silent())
    return Context(
        teacher=setup.teacher, task=setup.task, processor=setup.processor, train=setup.train,
        validation=setup.validation, test=None, target=load_target("local"), budget=Budget(), work=tmp_path,
        cache=tmp_path / "cache", progress=Silent(),
    )  # fmt: skip


def test_a_sample_is_drawn_once_and_missing_labels_are_the_teachers(ctx):
    importance = measure_importance(ctx.teacher, sample_batches(ctx.train, 16, seed=0))
    context = gather(ctx.teacher, importance, ctx, 48)
    expected = sample_batches(ctx.train, 48, seed=ctx.seed + 1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(context.batches, expected, strict=True))
    for batch, labels in zip(context.batches, context.labels, strict=True):
        good = (batch["input_ids"] == 45).any(1)
        assert torch.equal(labels, good.long())
    blank = replace(ctx.train, labels=np.full(len(ctx.train), -1))
    for batch, labels in zip(*vars_of(gather(ctx.teacher, importance, replace(ctx, train=blank), 48)), strict=True):
        assert torch.equal(labels, ctx.teacher.model(**batch).logits.argmax(-1))


def vars_of(context: ProxyContext):
    return context.batches, context.labels


def test_a_large_student_is_scored_on_fewer_examples(ctx, monkeypatch):
    importance = measure_importance(ctx.teacher, sample_batches(ctx.train, 16, seed=0))
    monkeypatch.setattr("edgekd.search.proxies.context.LARGE", 10)
    assert sum(len(labels) for labels in gather(ctx.teacher, importance, ctx, 90).labels) == 32


def test_scorer_is_the_divergence(ctx):
    importance = measure_importance(ctx.teacher, sample_batches(ctx.train, 16, seed=0))
    bad = replace(ctx.teacher.arch, layers=ctx.teacher.arch.layers[1:])
    context = gather(ctx.teacher, importance, ctx, 32)
    value = kl(context)(bad)
    with torch.no_grad():
        p = ctx.teacher.model(**context.batches[0]).logits.log_softmax(-1)
        q = cut(ctx.teacher, bad, importance).model(**context.batches[0]).logits.log_softmax(-1)
    assert value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
