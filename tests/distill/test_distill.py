"""Laws of the distillation stage, on small text and image models."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distill import Distill
from edgekd.distill.adjust import dropout, frozen
from edgekd.distill.finetune import Finetune
from edgekd.distill.losses import LOSSES
from edgekd.distill.scratch import SCRATCH
from edgekd.distill.signals import mean_tokens, observe, valid_tokens
from edgekd.distill.teachers import fingerprint, predict
from edgekd.distill.terms import parse_terms
from edgekd.distill.wiring import even, source, wire
from edgekd.errors import RecipeError

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "fp32"}


def test_a_student_learns_its_teacher_s_answers(text: Any) -> None:
    settings = Distill(epochs=20, batch_size=16, learning_rate=3e-3, precision="fp32", losses={"cross_entropy": 1})
    taught = settings.run(text.ctx.teacher, text.ctx)
    ctx = text.at(text.ctx.work / "second", teacher=taught)
    before = _agreement(text.student, ctx)
    after = _agreement(replace(settings, losses={"forward_kl": 1, "hidden_mse": 1}).run(text.student, ctx), ctx)
    assert after >= 0.9 > before


def _agreement(student: Any, ctx: Any) -> float:
    theirs = predict(ctx.teacher.model, ctx.validation).argmax(-1)
    return float((predict(student.model, ctx.validation).argmax(-1) == theirs).mean())


FOR_IMAGES = {name for name, loss in LOSSES.items() if "features" in loss.needs}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - FOR_IMAGES))
def test_every_loss_trains_a_text_student(text: Any, name: str) -> None:
    before = fingerprint(text.student.model)
    trained = Distill(losses={name: 1}, **QUICK).run(text.student, text.ctx)
    assert fingerprint(trained.model) != before
    assert fingerprint(text.student.model) == before
    assert all(torch.isfinite(p).all() for p in trained.model.parameters())
    assert trained.arch == text.student.arch


@pytest.mark.parametrize("losses", [{"hidden_mse": 1, "rkd": 1}, {"minilm": 1}], ids=["hidden", "minilm"])
@pytest.mark.parametrize("case", ["narrow_text", "image", "resnet"])
def test_losses_take_images_and_other_widths(case: str, losses: dict[str, float], request: Any) -> None:
    found = request.getfixturevalue(case)
    stage = Distill(losses=losses, **QUICK)
    if case == "resnet" and "minilm" in losses:
        with pytest.raises(RecipeError, match="loss 'minilm' needs attention, and a resnet student has none"):
            stage.run(found.student, found.ctx)
        return
    trained = stage.run(found.student, found.ctx)
    assert set(trained.model.state_dict()) == set(found.student.model.state_dict())


def test_the_cache_gives_what_the_live_teacher_gives(text: Any) -> None:
    results = []
    for cache in (True, False):
        ctx = text.at(text.ctx.work / str(cache))
        results.append(Distill(cache=cache, losses={"forward_kl": 1}, **QUICK).run(text.student, ctx))
    weights = [dict(result.model.named_parameters()) for result in results]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])


def test_a_stage_repeated_gives_the_same_bits(text: Any) -> None:
    prints = {
        fingerprint(Distill(dropout=None, **QUICK).run(text.student, text.at(text.ctx.work / name)).model)
        for name in "ab"
    }
    assert len(prints) == 1


def test_a_stage_resumes_a_finished_training(text: Any) -> None:
    first = Distill(**QUICK).run(text.student, text.ctx)
    again = Distill(**QUICK).run(text.student, text.ctx)
    assert fingerprint(first.model) == fingerprint(again.model)


def test_padding_and_the_order_of_samples_do_not_change_the_signals(text: Any) -> None:
    data, model = text.ctx.train, text.ctx.teacher.model
    with torch.no_grad():
        alone = observe(model, data.collate(np.array([4])), hidden=(2,))
        among = observe(model, data.collate(np.arange(8)), hidden=(2,))
    first = int(data.lengths[:4].sum())
    rows = among.hidden[2][first : first + int(data.lengths[4])]
    assert torch.allclose(rows, alone.hidden[2], atol=1e-5)


def test_labels_that_are_missing_come_from_the_teacher(text: Any) -> None:
    own = predict(text.ctx.teacher.model, text.ctx.train).argmax(-1)
    prints = []
    for name, labels in (("none", None), ("some", np.where(np.arange(48) % 2, own, -1)), ("all", own)):
        ctx = text.at(text.ctx.work / name, train=replace(text.ctx.train, labels=labels))
        prints.append(fingerprint(Distill(losses={"cross_entropy": 1}, **QUICK).run(text.student, ctx).model))
    assert len(set(prints)) == 1


def test_validation_without_labels_is_scored_against_the_teacher(text: Any) -> None:
    ctx = text.at(text.ctx.work, validation=replace(text.ctx.validation, labels=None))
    Distill(**QUICK).run(text.student, ctx)


def test_word_embeddings_stay_for_text_unless_asked(text: Any) -> None:
    word = "bert.embeddings.word_embeddings.weight"
    before = text.student.model.get_parameter(word)
    kept = Distill(**QUICK).run(text.student, text.ctx)
    moved = Distill(freeze_embeddings=False, **QUICK).run(text.student, text.at(text.ctx.work / "moved"))
    assert torch.equal(kept.model.get_parameter(word), before)
    assert not torch.equal(moved.model.get_parameter(word), before)
    assert all(parameter.requires_grad for parameter in kept.model.parameters())


def test_dropout_reaches_attention_and_is_put_back(text: Any) -> None:
    model = text.student.model.train()
    batch = text.ctx.train.collate(np.arange(4))
    with dropout(model, 0.0), torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_dropout_reaches_modules_whose_probability_is_a_whole_number() -> None:
    module = nn.Dropout(0)
    with dropout(module, 0.5):
        assert module.p == 0.5
    assert module.p == 0


def test_frozen_is_undone(text: Any) -> None:
    model = text.student.model
    with frozen([model.base_model.embeddings]):
        assert not any(p.requires_grad for p in model.base_model.embeddings.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_layer_maps() -> None:
    assert even(3, 6, ()) == ((1, 2), (2, 4), (3, 6))
    assert even(4, 6, ()) == ((1, 2), (2, 3), (3, 5), (4, 6))
    assert even(6, 6, ()) == tuple((i, i) for i in range(1, 7))
    assert source(3, 6, (0, 2, 5)) == ((1, 1), (2, 3), (3, 6))
    assert source(2, 6, (0, 9)) == even(2, 6, ())


def test_projectors_only_where_widths_differ(text: Any, narrow_text: Any) -> None:
    batch, terms = text.ctx.train.collate(np.arange(2)), parse_terms({"hidden_mse": 1})
    same = wire(text.student, text.ctx.teacher, terms, batch=batch, layer_map="source")
    other = wire(narrow_text.student, text.ctx.teacher, terms, batch=batch, layer_map="even")
    assert same.pairs == ((1, 1), (2, 4))
    assert not list(same.projectors.parameters())
    assert [tuple(p.shape) for p in other.projectors.parameters()] == [(32, 16), (32,)] * 2


def test_a_loss_that_two_classes_leave_constant_is_refused(text: Any) -> None:
    batch, terms = text.ctx.train.collate(np.arange(2)), parse_terms({"standardized_kl": 9})
    few = replace(text.student, model=copy.deepcopy(text.student.model))
    few.model.config.num_labels = 2
    with pytest.raises(RecipeError, match="'standardized_kl' has no gradient with fewer than 3 classes, and there are"):
        wire(few, text.ctx.teacher, terms, batch=batch, layer_map="even")
    few.model.config.num_labels = 3
    wire(few, text.ctx.teacher, terms, batch=batch, layer_map="even")


def test_tokens_of_convolutional_nets_and_their_mean() -> None:
    states = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    rows = valid_tokens(states, None)
    assert rows.shape == (8, 3)
    assert torch.equal(mean_tokens(rows, torch.tensor([4, 4])), states.mean((2, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {"fwd_kl": 1}}, r"unknown loss 'fwd_kl' \(did you mean 'forward_kl'\?\); choose one of: atten"),
        (
            {"losses": {"forward_kl": {"temprature": 2}}},
            r"unknown setting of loss 'forward_kl': 'temprature' \(did you",
        ),
        ({"losses": {"forward_kl": {"temperature": 0}}}, "temperature of loss 'forward_kl' must be above 0"),
        ({"losses": {"minilm": {"relation_heads": 0}}}, "relation_heads of loss 'minilm' must be a whole number of at"),
        ({"losses": {"sinkd": {"iterations": 20.0}}}, "a whole number of at least 1, not 20.0"),
        ({"losses": {"mse": "high"}}, "weight of loss 'mse' must be a number of at least 0, not 'high'"),
        ({"losses": {"mse": 0}}, "no loss has a weight above 0"),
        ({"losses": {}}, "no loss has a weight above 0"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"ema": 1.0}, "ema must be below 1, not 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number, not nan"),
        ({"schedule": "cosin"}, r"unknown schedule 'cosin' \(did you mean 'cosine'\?\); choose one of: constant, cos"),
        ({"epochs": 0, "warmup": 2}, "epochs must be at least 1, not 0; warmup must be at most 1, not 2"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distill(**settings)


def test_settings_are_checked_without_torch() -> None:
    code = "import sys; from edgekd.distill import Distill; Distill(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_setting_and_loss_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "distill.md").read_text(encoding="utf-8")
    names = [field.name for cls in (Distill, Finetune) for field in fields(cls)]
    names += [name for loss in LOSSES.values() for name in (loss.name, *loss.defaults)]
    names += [f"scratch:{name}" for name in SCRATCH]
    assert [name for name in names if f"`{name}`" not in text] == []
