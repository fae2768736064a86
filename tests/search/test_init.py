"""Checkpoints of another size become students, and are distilled across widths."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t

from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec, Examples
from edgekd.distill import Distill
from edgekd.distill.losses import LOSSES
from edgekd.distill.signals import observe, valid_mask
from edgekd.distill.terms import parse_terms
from edgekd.distill.wiring import source, wire
from edgekd.errors import ModelError, RecipeError
from edgekd.pipeline.setup import prepare
from edgekd.search.init import candidates
from edgekd.student import Student, load_student
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target
from edgekd.tasks import TASKS

LOSS = LOSSES["minilm"].function


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    return one_thread


@pytest.fixture
def ctx(make_model, text_data, tmp_path: Path) -> Context:
    setup = prepare(make_model("bert"), DataSpec(path=str(text_data)), progress=Silent())
    return Context(
        teacher=setup.teacher, task=setup.task, processor=setup.processor, train=setup.train,
        validation=setup.validation, test=setup.test, target=load_target("local"), budget=Budget(),
        work=tmp_path / "work", cache=tmp_path / "cache", progress=Silent(),
    )  # fmt: skip


@pytest.fixture
def images(ctx, make_model) -> Context:
    task = TASKS["image-classification"]
    teacher = load_student(make_model("vit"), auto_class=task.auto_class)
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    data = task.encode(task.load_processor(make_model("vit")), Examples(columns={"image": noise}), None)
    return replace(ctx, teacher=teacher, task=task, processor=None, train=data, validation=data, test=None)


@pytest.fixture
def small(ctx, tmp_path: Path):
    """A function that writes a narrow BERT without a head of its own, beside the teacher's tokenizer."""

    def make(name: str = "small", model_class=t.BertForMaskedLM, **changes) -> Path:
        torch.manual_seed(7)
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        table = {"vocab_size": ctx.teacher.arch.vocabulary, "max_position_embeddings": 40, "pad_token_id": 0}
        folder = tmp_path / name
        model_class(t.BertConfig(**{**shape, **table, **changes})).save_pretrained(folder)
        ctx.processor.hf.save_pretrained(folder)
        return folder

    return make


def test_a_checkpoint_without_a_head_becomes_a_student(ctx, small):
    folder = small()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first, again = candidates([folder, str(folder)], ctx)
    assert torch.equal(torch.get_rng_state(), state)
    other = candidates([folder], replace(ctx, seed=1))[0]
    base = t.BertForMaskedLM.from_pretrained(folder).bert.state_dict()
    own = first.model.bert.state_dict()
    assert all(torch.equal(own[name], value) for name, value in base.items())
    for name, value in first.model.state_dict().items():
        fresh = name.startswith(("classifier", "bert.pooler")) and name.endswith("weight")
        assert torch.equal(value, again.model.state_dict()[name])
        assert torch.equal(value, other.model.state_dict()[name]) != fresh
    assert first.model.config.id2label == {0: "negative", 1: "positive"}
    assert first.model.config.label2id == {"negative": 0, "positive": 1}
    assert first.arch.hidden == 16
    assert first.processor_dir == ctx.teacher.processor_dir
    assert not first.model.training
    assert first.model(**ctx.train.collate([0, 1])).logits.shape == (2, 2)


def test_its_layers_come_from_no_layer_of_the_teacher(ctx, small):
    student = candidates([small()], ctx)[0]
    sources = [layer.source for layer in student.arch.layers]
    assert sources == [3, 4]
    assert source(2, 3, sources) == source(2, 3, [0, 1, 2]) != source(2, 3, [0, 1])
    batches = sample_batches(ctx.train, 16, seed=0)
    one = replace(student.arch, layers=student.arch.layers[1:])
    shallow = cut(student, one, measure_importance(student, batches))
    assert [layer.source for layer in shallow.arch.layers] == [4]


def test_a_head_of_the_same_classes_is_kept_and_one_of_others_is_not(ctx, small):
    names = {0: "negative", 1: "positive"}
    same = small("same", t.BertForSequenceClassification, id2label=names)
    swapped = small("swapped", t.BertForSequenceClassification, id2label={0: "positive", 1: "negative"})
    wider = small("wider", t.BertForSequenceClassification, num_labels=5)
    made = [t.BertForSequenceClassification.from_pretrained(folder) for folder in (same, swapped)]
    first, second, third = candidates([same, swapped, wider], ctx)
    assert torch.equal(first.model.classifier.weight, made[0].classifier.weight)
    assert not torch.equal(second.model.classifier.weight, made[1].classifier.weight)
    assert torch.equal(second.model.bert.pooler.dense.weight, made[1].bert.pooler.dense.weight)
    for student in (second, third):
        assert student.model.classifier.weight.shape == (2, 16)
        assert student.model.classifier.bias.abs().max() == 0
        assert student.model.config.id2label == names


def test_a_checkpoint_that_was_trained_otherwise_becomes_a_classifier(ctx, small, tmp_path):
    names = {0: "negative", 1: "positive"}
    folder = small("other", t.BertForSequenceClassification, id2label=names, problem_type="regression")
    student = candidates([folder], ctx)[0]
    assert student.model.config.problem_type == ctx.teacher.model.config.problem_type
    assert student.model.classifier.bias.abs().max() == 0
    own = t.BertForSequenceClassification.from_pretrained(folder)
    assert not torch.equal(student.model.classifier.weight, own.classifier.weight)


def test_a_head_of_the_usual_two_classes_is_kept_too(ctx, small):
    """Transformers leaves their names out of config.json."""
    usual = {0: "LABEL_0", 1: "LABEL_1"}
    folder = small("usual", t.BertForSequenceClassification)
    made = t.BertForSequenceClassification.from_pretrained(folder)
    ctx.teacher.model.config.id2label = usual
    [student] = candidates([folder], ctx)
    assert torch.equal(student.model.classifier.weight, made.classifier.weight)


def test_a_student_that_edgekd_wrote_is_taken_with_its_shapes(ctx, tmp_path):
    importance = measure_importance(ctx.teacher, sample_batches(ctx.train, 16, seed=0))
    full = ctx.teacher.arch
    shape = replace(full, layers=(replace(full.layers[0], heads=2, neurons=24), full.layers[2]))
    student = cut(ctx.teacher, shape, importance)
    replace(student, plan=shape).save(tmp_path / "own")
    found = candidates([tmp_path / "own"], ctx)[0]
    assert [(x.source, x.heads, x.neurons) for x in found.arch.layers] == [(3, 2, 24), (4, 4, 64)]
    assert found.plan is None
    batch = ctx.train.collate([0, 1, 2])
    assert torch.equal(found.model(**batch).logits, student.model(**batch).logits)
    student.model.config.id2label = {0: "no", 1: "yes"}
    student.save(tmp_path / "other")
    with pytest.raises(RecipeError, match="has the classes no, yes, and the teacher negative, positive"):
        candidates([tmp_path / "other"], ctx)


def test_images_too(images, make_model, tmp_path):
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for name, size, channels in (("same", 8, 1), ("larger", 16, 1), ("colour", 8, 3)):
        config = t.ViTConfig(**shape, image_size=size, patch_size=4, num_channels=channels)
        t.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / name)
    student, conv = candidates([tmp_path / "same", make_model("resnet")], images)
    assert student.model(**images.train.collate(np.array([0]))).logits.shape == (1, 2)
    assert conv.arch.family == "resnet"
    with pytest.raises(RecipeError, match="larger takes images of 16x16, and the teacher of 8x8"):
        candidates([tmp_path / "larger"], images)
    with pytest.raises(RecipeError, match="colour takes images of 3 channels, and the teacher of 1"):
        candidates([tmp_path / "colour"], images)
    with pytest.raises(RecipeError, match="takes text, and the teacher's task is image-classification"):
        candidates([make_model("bert")], images)


def test_wrong_folders_are_named(ctx, small, make_model, tmp_path):
    with pytest.raises(ModelError, match="no model folder at './nowhere'"):
        candidates(["./nowhere"], ctx)
    with pytest.raises(RecipeError, match="takes images, and the teacher's task is text-classification"):
        candidates([make_model("vit")], ctx)
    with pytest.raises(RecipeError, match="takes input_ids, attention_mask, and the teacher input_ids, attention_mask"):
        candidates([make_model("distilbert")], ctx)
    with pytest.raises(RecipeError, match="takes at most 8 tokens, and the data has 1[0-9]"):
        candidates([small("short", max_position_embeddings=8)], ctx)
    with pytest.raises(RecipeError, match="knows 30 tokens, and the teacher's tokenizer has 47"):
        candidates([small("few", vocab_size=30)], ctx)
    folder = small("gpt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="cannot compress models of type 'gpt2'"):
        candidates([folder], ctx)


def test_another_tokenizer_is_refused(ctx, small, tmp_path):
    folder = small("foreign")
    for file in folder.glob("*token*"):
        file.unlink()
    words = list(ctx.processor.hf.get_vocab())
    words = sorted(words, key=ctx.processor.hf.get_vocab().get)
    swapped = [*words[:7], words[8], words[7], *words[9:]]
    (folder / "vocab.txt").write_text("\n".join(swapped), encoding="utf-8")
    t.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    message = r"has another tokenizer than the teacher: token 'word2' is 7 there and 8 here \(2 of 47 tokens differ\)"
    with pytest.raises(RecipeError, match=message):
        candidates([folder], ctx)
    for file in [*folder.glob("*token*"), folder / "vocab.txt"]:
        file.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        candidates([folder], ctx)


def test_weights_must_be_safe_and_reach_up_to_the_head(ctx, small):
    pickled = small("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        candidates([pickled], ctx)
    deeper = small("deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks weights of BertFor.* below its head \(bert.encoder.layer.2"):
        candidates([deeper], ctx)
    broken = small("broken")
    (broken / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be loaded as AutoModelForSequenceClassification"):
        candidates([broken], ctx)


# Distillation across widths


def wired(student: Student, teacher: Student, ctx: Context, **settings):
    batch = ctx.train.collate([0, 1])
    return wire(student, teacher, parse_terms({"minilm": settings or 1.0}), batch=batch, layer_map="even")


def relation_loss(student: Student, teacher: Student, ctx: Context, indices, width: int | None = None, **settings):
    """MiniLM of two models on texts, padded to `width`."""
    wiring = wired(student, teacher, ctx, **settings)
    batch = ctx.train.collate(indices, width)
    ours = observe(student.model, batch, hidden=(), qkv=wiring.student_qkv)
    theirs = observe(teacher.model, batch, hidden=(), qkv=wiring.teacher_qkv)
    return LOSS(ours.qkv, theirs.qkv, valid_mask(batch, batch["input_ids"].shape[1]))


def test_relations_of_a_teacher_with_itself_are_equal(ctx):
    other = replace(ctx.teacher, model=copy.deepcopy(ctx.teacher.model))
    assert relation_loss(other, ctx.teacher, ctx, [0, 1, 2, 3]).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("relation_heads", [48, 4, 3])
def test_relations_across_widths_do_not_see_padding_and_have_a_slope(ctx, small, relation_heads):
    student = candidates([small()], ctx)[0]
    settings = {"relation_heads": relation_heads}
    close, wide = (relation_loss(student, ctx.teacher, ctx, [0, 1, 2, 3], width, **settings) for width in (16, 32))
    assert close.item() > 1e-4
    assert wide.item() == pytest.approx(close.item(), rel=1e-4)
    close.backward()
    for module in wired(student, ctx.teacher, ctx).student_qkv:
        assert module.weight.grad.abs().sum() > 0


def test_the_teachers_layer_can_be_chosen(ctx, small):
    student = candidates([small()], ctx)[0]
    layers = [tuple(ctx.teacher.family.qkv(layer)) for layer in ctx.teacher.family.layers(ctx.teacher.model)]
    assert wired(student, ctx.teacher, ctx).teacher_qkv == layers[-1]
    for number in (1, 2, 3):
        assert wired(student, ctx.teacher, ctx, teacher_layer=number).teacher_qkv == layers[number - 1]
    own = [tuple(student.family.qkv(layer)) for layer in student.family.layers(student.model)]
    assert wired(student, ctx.teacher, ctx, teacher_layer=1).student_qkv == own[-1]
    with pytest.raises(RecipeError, match="teacher_layer of loss 'minilm' is 4; layers of the teacher .*: 1, 2, 3"):
        wired(student, ctx.teacher, ctx, teacher_layer=4)
    with pytest.raises(RecipeError, match="teacher_layer of loss 'minilm' must be a whole number of at least 0"):
        wired(student, ctx.teacher, ctx, teacher_layer=1.5)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ([{}, {}, {"tokens": 1}], 2),
        ([{}, {"tokens": 6}, {"tokens": 6}], 2),
        ([{"tokens": 6}, {"tokens": 4}, {"tokens": 1}], 1),
        ([{}, {}, {"shares": True}], 2),
        ([{}, {"shares": True}, {"tokens": 1}], 1),
    ],
)
def test_relations_are_of_the_last_layer_with_all_tokens(ctx, changes, number):
    layers = tuple(replace(layer, **change) for layer, change in zip(ctx.teacher.arch.layers, changes, strict=True))
    student = replace(ctx.teacher, arch=replace(ctx.teacher.arch, layers=layers))
    chosen = wired(student, ctx.teacher, ctx).student_qkv
    assert chosen == tuple(student.family.qkv(student.family.layers(student.model)[number - 1]))


def test_a_student_without_such_a_layer_is_refused(ctx):
    first = (replace(ctx.teacher.arch.layers[0], tokens=1), *ctx.teacher.arch.layers[1:])
    student = replace(ctx.teacher, arch=replace(ctx.teacher.arch, layers=first))
    with pytest.raises(RecipeError, match="needs a layer of the student that computes all tokens, and there is none"):
        wired(student, ctx.teacher, ctx)


def test_a_narrow_checkpoint_is_distilled(ctx, small):
    student = candidates([small()], ctx)[0]
    losses = {"forward_kl": 1.0, "minilm": {"weight": 1.0, "teacher_layer": 2}, "hidden_mse": 1.0}
    stage = Distill(epochs=2, batch_size=16, learning_rate=1e-3, losses=losses, layer_map="source", precision="fp32")
    trained = stage.run(student, ctx)
    assert trained.arch == student.arch
    before, after = (relation_loss(s, ctx.teacher, ctx, range(32), teacher_layer=2).item() for s in (student, trained))
    assert after < before
    assert set(trained.model.state_dict()) == set(student.model.state_dict())
