"""The operators stage: what it asks of a shape, what samples tell it, and when its guard lets an operator go."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from edgekd.arch import Arch, Layer
from edgekd.context import Budget, Context, Silent
from edgekd.errors import RecipeError, StageError
from edgekd.families import arch_of
from edgekd.families.compact import ACTIVATIONS as KNOWN_ACTIVATIONS
from edgekd.families.compact import NORMS as KNOWN_NORMS
from edgekd.families.compact_norm import Affine
from edgekd.families.compact_rank import LowRank
from edgekd.operators import ACTIVATIONS, NORMS, Operators, apply, guard
from edgekd.operators.shapes import inner_layers, rank_of
from edgekd.operators.statistics import attention_similarity, calibrate_affine, refactorise
from edgekd.student import load_student
from edgekd.target import Target, load_target
from edgekd.tasks import TASKS
from edgekd.tasks.text_classification import EncodedText

HERE = Target(name="here", title="here", runtime="onnxruntime", device="cpu", precisions=("fp32",))


def arch(depth: int = 6, *, heads: int = 4, family: str = "bert") -> Arch:
    layers = tuple(Layer(source=i, heads=heads, neurons=64) for i in range(depth))
    return Arch(family=family, hidden=32, head_dim=8, vocabulary=47, layers=layers)


def tokens_of(shape: Arch) -> list[int]:
    return [layer.tokens for layer in shape.layers]


def shares_of(shape: Arch) -> list[int]:
    return [i for i, layer in enumerate(shape.layers) if layer.shares]


@pytest.fixture
def student(make_model):
    return load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")


def test_what_a_model_cannot_have_is_not_foreseen(make_model, student):
    asked = Operators(tokens=[8, 4], share=1)
    assert asked.possible(student) == asked
    resnet = load_student(make_model("resnet"), auto_class="AutoModelForImageClassification")
    assert asked.possible(resnet) == Operators(first_token=False)
    relative = copy.deepcopy(student)
    for layer in relative.model.bert.encoder.layer:
        layer.attention.self.position_embedding_type = "relative_key"
    assert asked.possible(relative) == Operators(first_token=False)
    config = DeiTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
    )
    model = DeiTForImageClassificationWithTeacher(config)
    both = replace(student, model=model, arch=arch_of(model, (0, 1)))
    assert asked.possible(both) == Operators(first_token=False, share=1)


@pytest.fixture
def texts() -> EncodedText:
    lengths = np.random.default_rng(1).integers(4, 20, 24)
    ids = np.random.default_rng(0).integers(5, 40, int(lengths.sum())).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    return EncodedText(
        ids=ids, types=None, starts=starts, lengths=lengths, labels=None, padding=(0, 0), left=False, longest=24
    )


@pytest.fixture
def context(student, texts, tmp_path):
    def make(**other) -> Context:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        values = {
            "teacher": student,
            "task": TASKS["text-classification"],
            "processor": None,
            "train": texts,
            "validation": texts,
            "test": None,
            "target": HERE,
            "budget": Budget(speedup=2.0, sequence=16),
            "work": work,
            "cache": tmp_path,
            "progress": Silent(),
        }
        return Context(**{**values, **other})

    return make


@pytest.fixture
def timed(monkeypatch):
    """Replace the stopwatch: every pair of artifacts gets this speedup, give or take 1 %."""
    seen: list[tuple[str, str]] = []

    def answer(speedup: float, spread: float = 0.01) -> list[tuple[str, str]]:
        def pair(before: Path, after: Path, ctx: Context) -> tuple[float, tuple[float, float]]:
            assert before.is_file()
            assert after.is_file()
            seen.append((before.name, after.name))
            return speedup, (speedup - spread, speedup + spread)

        monkeypatch.setattr(guard, "time_pair", pair)
        return seen

    return answer


def entries(ctx: Context) -> dict[str, dict]:
    return {entry["operator"]: entry for entry in ctx.notes["operators"]}


def logits(model: nn.Module, texts: EncodedText) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**texts.collate(np.arange(12))).logits


def test_by_default_only_the_last_layer_changes():
    shape = Operators().reshape(arch())
    assert tokens_of(shape) == [0, 0, 0, 0, 0, 1]
    assert replace(shape, layers=(*shape.layers[:-1], arch().layers[-1])) == arch()
    assert Operators(first_token=False).reshape(arch()) == arch()


def test_tokens_fall_where_the_list_says():
    assert tokens_of(Operators(tokens=[0, 32, 32, 16]).reshape(arch())) == [0, 32, 0, 16, 0, 1]
    assert tokens_of(Operators(tokens=[8], first_token=False).reshape(arch(2))) == [8, 0]
    assert tokens_of(Operators(tokens=[0, 32, 16, 8, 4]).reshape(arch(2))) == [0, 1]


def test_sharing_leaves_first_and_last_alone_and_needs_equal_heads_and_all_tokens():
    assert inner_layers(arch()) == [2, 3, 4]
    assert shares_of(Operators(share=2).reshape(arch())) == [3, 4]
    assert shares_of(Operators(share=9).reshape(arch())) == [2, 3, 4]
    assert shares_of(Operators(share=[1, 5, 9]).reshape(arch())) == [1, 5]
    assert shares_of(Operators(share=3).reshape(arch(3))) == []
    uneven = replace(arch(), layers=tuple(replace(layer, heads=2 + i // 3) for i, layer in enumerate(arch().layers)))
    assert shares_of(Operators(share=[1, 2, 3, 4]).reshape(uneven)) == [1, 2, 4]
    assert shares_of(Operators(share=[2, 3, 4], tokens=[0, 0, 8]).reshape(arch())) == [2, 4]


def test_rank_divides_the_weights_of_a_layer():
    shape = Operators(rank=2.0, activation="relu", norm="affine").reshape(arch())
    layer = shape.layers[0]
    assert (layer.activation, layer.norm, layer.rank) == ("relu", "affine", 9)
    # 4 matrices of 32 x 32 and 2 of 32 x 64.
    assert 9 * (4 * 64 + 2 * 96) <= (4 * 1024 + 2 * 2048) / 2 < 10 * (4 * 64 + 2 * 96)
    assert rank_of(replace(layer, shares=True), 32, 8, 2.0) == 9
    assert rank_of(replace(layer, heads=1), 32, 8, 2.0) == 7
    assert rank_of(layer, 32, 8, 1e6) == 1


def test_convolutional_nets_are_left_as_they_are():
    everything = Operators(tokens=[4], share=2, activation="relu", norm="affine", rank=2.0)
    assert everything.reshape(arch(heads=0, family="resnet")) == arch(heads=0, family="resnet")


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation": "rellu"},
        {"norm": "none"},
        {"tokens": [1]},
        {"tokens": []},
        {"tokens": [0]},
        {"tokens": [8, 16]},
        {"tokens": [8, 0, 4]},
        {"rank": 1.0},
        {"samples": 0},
        {"share": -1},
        {"share": [0]},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RecipeError):
        Operators(**wrong)


def test_what_the_settings_name_is_what_families_know():
    assert ACTIVATIONS == KNOWN_ACTIVATIONS
    assert NORMS == KNOWN_NORMS


def test_similar_attention_is_found(student, texts):
    layers = student.family.layers(student.model)
    batch = texts.collate(np.arange(6))
    with torch.no_grad():
        states = student.model(**batch, output_hidden_states=True, output_attentions=True)
    maps = states.attentions
    rows = torch.cosine_similarity(maps[0], maps[1], dim=-1).mean(1)
    told = float(rows[batch["attention_mask"].bool()].mean())
    found = attention_similarity(student, [batch])
    assert len(found) == len(layers) - 1
    assert found[0] == pytest.approx(told, abs=1e-5)
    for part in ("query", "key"):
        for index in (1, 2):
            for parameter in getattr(layers[index].attention.self, part).parameters():
                parameter.data.zero_()
    assert attention_similarity(student, [batch])[1] == pytest.approx(1.0, abs=1e-6)


def test_layers_with_the_most_similar_attention_share(make_model, context, timed, monkeypatch):
    import transformers as t

    config = t.BertConfig(
        vocab_size=47, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    from edgekd.families import arch_of
    from edgekd.student import Student

    model = t.BertForSequenceClassification(config).eval()
    deep = Student(model=model, arch=arch_of(model))
    monkeypatch.setattr(apply, "attention_similarity", lambda student, batches: [0.9, 0.5, 0.8, 0.7, 0.99])
    timed(1.5)
    ctx = context()
    made = Operators(share=2).run(deep, ctx)
    # The similarity of layer i with the one before is at i - 1; layers 2 to 4 may share.
    assert shares_of(made.arch) == [3, 4]
    assert entries(ctx)["share"]["layers"] == [3, 4]


def test_affine_norms_are_fitted_to_layer_norms(student, texts):
    layers = [replace(layer, norm="affine") for layer in student.arch.layers]
    plain = apply.with_operators(student, replace(student.arch, layers=tuple(layers)))
    fitted = plain.with_model(copy.deepcopy(plain.model))
    batches = [texts.collate(np.arange(12)), texts.collate(np.arange(12, 24))]
    calibrate_affine(fitted, batches)
    told = logits(student.model, texts)
    assert (logits(fitted.model, texts) - told).norm() < 0.7 * (logits(plain.model, texts) - told).norm()
    norm = student.model.bert.encoder.layer[0].attention.output.LayerNorm
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    masks = []
    for batch in batches:
        with torch.no_grad():
            student.model(**batch)
        masks.append(batch["attention_mask"].bool())
    handle.remove()
    x, y = (torch.cat([part[mask] for part, mask in zip(seen[i::2], masks, strict=True)]) for i in (0, 1))
    affine = fitted.model.bert.encoder.layer[0].attention.output.LayerNorm
    assert isinstance(affine, Affine)
    torch.testing.assert_close(affine(x).mean(0), y.mean(0), atol=1e-4, rtol=0)
    for change in (0.9, 1.1):
        other = (x * affine.weight * change + y.mean(0) - (x * affine.weight * change).mean(0) - y).square().mean()
        assert (affine(x) - y).square().mean() < other


def test_factors_are_made_for_what_a_matrix_reads(student, texts):
    layers = tuple(replace(layer, rank=9) for layer in student.arch.layers)
    plain = apply.with_operators(student, replace(student.arch, layers=layers))
    aware = plain.with_model(copy.deepcopy(plain.model))
    batch = texts.collate(np.arange(24))
    refactorise(aware, student, [batch])
    inputs: list[torch.Tensor] = []
    linear = student.model.bert.encoder.layer[0].intermediate.dense
    handle = linear.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    with torch.no_grad():
        student.model(**batch)
    handle.remove()
    rows = inputs[0][batch["attention_mask"].bool()]

    def error(side) -> float:
        module = side.model.bert.encoder.layer[0].intermediate.dense
        assert isinstance(module, LowRank)
        return float((module(rows) - linear(rows)).detach().square().sum())

    assert error(aware) < error(plain)


def test_what_is_faster_stays(student, context, timed):
    seen, ctx = timed(1.2), context()
    before = copy.deepcopy(student.model.state_dict())
    made = Operators(tokens=[8], activation="relu").run(student, ctx)
    assert tokens_of(made.arch) == [8, 0, 1]
    assert [layer.activation for layer in made.arch.layers] == ["relu"] * 3
    # Each operator is timed against what the ones before it left.
    assert seen == [
        ("without.onnx", "with-first_token.onnx"),
        ("with-first_token.onnx", "with-tokens.onnx"),
        ("with-tokens.onnx", "with-activation.onnx"),
    ]
    found = entries(ctx)
    assert all(found[name]["kept"] for name in ("first_token", "tokens", "activation"))
    assert found["tokens"]["interval"] == pytest.approx([1.19, 1.21])
    assert student.arch.layers == tuple(replace(layer) for layer in student.arch.layers)
    assert all(torch.equal(before[name], value) for name, value in student.model.state_dict().items())


@pytest.mark.parametrize(("speedup", "spread"), [(1.005, 0.01), (0.9, 0.01), (1.0, 0.0)])
def test_what_is_not_faster_with_certainty_goes(student, context, timed, monkeypatch, speedup, spread):
    # In so small a model a few nodes less are a file 1 % smaller.
    monkeypatch.setattr(guard, "SMALLER", 0.5)
    seen, ctx = timed(speedup, spread), context()
    made = Operators(tokens=[8]).run(student, ctx)
    assert made is student
    assert {before for before, _ in seen} == {"without.onnx"}
    assert not any(entry["kept"] for entry in ctx.notes["operators"])
    assert "dropped" in entries(ctx)["tokens"]["reason"]


def test_force_keeps_what_is_slower(student, context, timed):
    timed(0.9)
    ctx = context()
    made = Operators(tokens=[8], force=True).run(student, ctx)
    assert tokens_of(made.arch) == [8, 0, 1]
    assert "because of force" in entries(ctx)["tokens"]["reason"]


def test_what_is_smaller_stays_unless_it_is_slower_and_size_does_not_count(student, context, timed):
    settings = Operators(first_token=False, rank=4.0)
    for speedup, budget, kept in (
        (1.0, Budget(speedup=2.0), True),
        (0.9, Budget(speedup=2.0), False),
        (0.9, Budget(speedup=2.0, size_mb=1.0), True),
    ):
        timed(speedup)
        ctx = context(budget=budget)
        settings.run(student, ctx)
        assert entries(ctx)["rank"]["kept"] is kept
        assert entries(ctx)["rank"]["bytes_after"] < entries(ctx)["rank"]["bytes_before"]


def test_where_nothing_can_be_timed_only_what_is_exact_stays(student, context):
    npu = load_target("npu-ethos-u55-256")
    ctx = context(target=npu)
    made = Operators(tokens=[8]).run(student, ctx)
    assert tokens_of(made.arch) == [0, 0, 1]
    assert "unmeasured" in entries(ctx)["first_token"]["reason"]
    assert "force" in entries(ctx)["tokens"]["reason"]
    forced = Operators(tokens=[8], force=True).run(student, context(target=npu))
    assert tokens_of(forced.arch) == [8, 0, 1]


def test_an_exact_operator_that_is_not_is_a_defect(student, context, timed, monkeypatch):
    timed(2.0)
    whole = apply.with_operators

    def broken(own, shape):
        made = whole(own, shape)
        made.model.classifier.bias.data.add_(0.01)
        return made

    monkeypatch.setattr(apply, "with_operators", broken)
    with pytest.raises(StageError, match="first_token"):
        Operators().run(student, context())


def test_what_the_model_has_already_and_what_it_cannot_have_is_said(student, context, timed, make_model):
    timed(2.0)
    ctx = context()
    Operators(first_token=False, activation="gelu").run(student, ctx)
    assert "nothing to change" in entries(ctx)["activation"]["reason"]
    student.model.config.is_decoder = False
    for layer in student.family.layers(student.model):
        layer.attention.self.position_embedding_type = "relative_key"
    ctx = context()
    assert Operators().run(student, ctx) is student
    assert "relative positions" in entries(ctx)["first_token"]["reason"]


def test_the_first_token_is_built_and_timed_on_this_machine(student, context, texts):
    target, settings = load_target("local"), guard.Settings
    ctx = context(target=target, lowering="int8_dynamic_fused")
    guard_settings = {"blocks": 8, "block_ms": 1.0, "min_runs": 16, "max_seconds": 2.0, "warmup_seconds": 0.1}
    guard.Settings = lambda **given: settings(**{**guard_settings, **given})
    try:
        made = Operators(force=True).run(student, ctx)
    finally:
        guard.Settings = settings
    entry = entries(ctx)["first_token"]
    assert entry["speedup"] > 0
    assert entry["interval"][0] <= entry["interval"][1]
    torch.testing.assert_close(logits(made.model, texts), logits(student.model, texts), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("second", "kept"), [(0.99, False), (1.01, True)])
def test_a_small_gain_must_hold_in_a_second_process(tmp_path, context, monkeypatch, second, kept):
    files = [tmp_path / name for name in ("before", "after")]
    for file in files:
        file.write_bytes(b"same size")
    lows = iter([1.02, second])
    monkeypatch.setattr(guard, "time_pair", lambda *parts: (1.05, (next(lows), 1.08)))
    verdict = guard.weigh(*files, context(), force=False)
    assert verdict.kept is kept
    assert verdict.interval == (min(1.02, second), 1.08)
    assert next(lows, None) is None
