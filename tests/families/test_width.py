from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edgekd.arch import Arch
from edgekd.errors import ModelError
from edgekd.export.lower import lower
from edgekd.export.onnx import export_float
from edgekd.families import arch_of, family_of
from edgekd.student import Student, load_student
from edgekd.surgery import Importance, cut
from edgekd.surgery.cut import channel_scores
from edgekd.surgery.importance import top

TEXT = ["bert", "roberta", "xlm-roberta", "electra", "electra-wide", "distilbert"]
VISION = ["vit", "deit"]
RESNETS = ["resnet", "resnet-bottleneck"]
WIDTH = 20


def load(make_model, kind: str) -> Student:
    return load_student(make_model(kind), auto_class=auto_class(kind))


def auto_class(kind: str) -> str:
    return f"AutoModelFor{'Sequence' if kind in TEXT else 'Image'}Classification"


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind not in TEXT:
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(5, 40, (3, 9), generator=generator), "attention_mask": mask}


@torch.no_grad()
def logits(model: Student | nn.Module, kind: str) -> torch.Tensor:
    module = model.model if isinstance(model, Student) else model
    return module.eval()(**inputs(kind)).logits


def ranked(student: Student) -> Importance:
    """Random scores, so that what is kept is no prefix."""
    generator = torch.Generator().manual_seed(3)
    heads = tuple(torch.rand(layer.heads, generator=generator) for layer in student.arch.layers)
    neurons = tuple(torch.rand(layer.neurons, generator=generator) for layer in student.arch.layers)
    hidden = None if student.arch.channels else torch.rand(student.arch.hidden, generator=generator)
    return Importance(heads, neurons, torch.ones(len(heads)), hidden)


def slim(arch: Arch) -> Arch:
    """Narrower in every way, and one layer less."""
    layers = tuple(
        replace(layer, heads=max(layer.heads - 1 - i % 2, min(layer.heads, 1)), neurons=layer.neurons // 2 + i)
        for i, layer in enumerate(arch.layers)
    )
    if not arch.channels:
        return replace(arch, hidden=WIDTH, layers=layers[:1] + layers[2:])
    return replace(arch, hidden=24, channels=(6, 12, 24), layers=layers[:-1])


class MaskedNorm(nn.Module):
    """A LayerNorm that sees the kept channels alone and says 0 on the others."""

    def __init__(self, norm: nn.LayerNorm, keep: torch.Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.keep = torch.zeros(norm.normalized_shape[0]).index_fill(0, keep, 1.0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mean = (states * self.keep).sum(-1, keepdim=True) / self.keep.sum()
        variance = ((states - mean).square() * self.keep).sum(-1, keepdim=True) / self.keep.sum()
        scaled = (states - mean) / torch.sqrt(variance + self.norm.eps)
        return (scaled * self.norm.weight + self.norm.bias) * self.keep


WRITERS = ("output.dense", "out_lin", "ffn.lin2", "embeddings_project", "projection", "_embeddings", "_token")


@torch.no_grad()
def silence(model: nn.Module, keep: torch.Tensor, width: int) -> nn.Module:
    """The full-width model with all but the kept channels of its residual stream at 0."""
    model = copy.deepcopy(model)
    lost = torch.ones(width, dtype=torch.bool)
    lost[keep] = False
    for name, parameter in model.base_model.named_parameters():
        path, _, _ = name.rpartition(".")
        if name.endswith(("_token", "position_embeddings")):
            parameter[..., lost] = 0
        elif path.endswith("_embeddings") and parameter.shape[-1] == width:
            parameter[:, lost] = 0
        elif path.endswith(WRITERS) and parameter.shape[0] == width:
            parameter[lost] = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm) and module.normalized_shape[0] == width:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, MaskedNorm(module, keep))
    return model


@pytest.mark.parametrize("kind", TEXT + VISION)
def test_a_narrow_residual_stream_equals_a_masked_one(make_model, kind):
    student = load(make_model, kind)
    scores = ranked(student)
    small = cut(student, replace(student.arch, hidden=WIDTH), scores)
    masked = silence(student.model, top(scores.hidden, WIDTH), student.arch.hidden)
    assert small.arch == replace(student.arch, hidden=WIDTH)
    assert small.model.config.to_dict() == student.model.config.to_dict()
    assert (logits(small, kind) - logits(student, kind)).abs().max() > 1e-3
    assert (logits(small, kind) - logits(masked, kind)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", TEXT + VISION)
def test_channels_come_in_the_order_asked_for(make_model, kind):
    student = load(make_model, kind)
    model = copy.deepcopy(student.model)
    order = torch.randperm(student.arch.hidden, generator=torch.Generator().manual_seed(0))
    student.family.slice_hidden(model, order)
    assert torch.allclose(logits(model, kind), logits(student, kind), atol=1e-5)
    first, path = student.family.layers(model)[0], student.family.places.up
    before = student.family.layers(student.model)[0].get_submodule(path).weight
    assert torch.equal(first.get_submodule(path).weight, before[:, order])


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", RESNETS)
def test_narrow_stages_equal_masked_ones(make_model, kind, index):
    student = load(make_model, kind)
    assert student.arch.channels == (8, 16, 32)
    widths = tuple(width - 3 * (i == index) for i, width in enumerate(student.arch.channels))
    small = cut(student, replace(student.arch, channels=widths, hidden=widths[-1]), ranked(student))
    keep = top(channel_scores(student.family.channel_sources(student.model, index)), widths[index])
    _silence_stage(student.model, index, keep)
    assert small.arch.channels == widths
    assert small.arch.hidden == widths[-1]
    assert not any(module.training for module in small.model.modules() if isinstance(module, nn.BatchNorm2d))
    assert (logits(small, kind) - logits(student, kind)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", RESNETS)
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_the_size_of_weights_before_a_norm_has_no_say_in_which_channels_stay(make_model, kind, factor):
    student = load(make_model, kind)
    keep = torch.arange(20)
    _silence_stage(student.model, 2, keep)
    told = logits(student, kind)
    block = student.model.base_model.encoder.stages[1].layers[-1].layer[-1]
    scale = torch.where(torch.arange(32) < 20, factor, 1.0)
    block.convolution.weight *= scale[:, None, None, None]
    block.normalization.running_mean *= scale
    block.normalization.running_var *= scale**2
    block.normalization.eps = 0.0
    assert (logits(student, kind) - told).abs().max() < 1e-3
    small = cut(student, replace(student.arch, channels=(8, 16, 20), hidden=20), ranked(student))
    assert (logits(small, kind) - logits(student, kind)).abs().max() < 1e-5


@torch.no_grad()
def _silence_stage(model: nn.Module, index: int, keep: torch.Tensor) -> None:
    if index == 0:
        norms = [model.base_model.embedder.embedder.normalization]
    else:
        blocks = list(model.base_model.encoder.stages[index - 1].layers)
        norms = [block.layer[-1].normalization for block in blocks] + [blocks[0].shortcut.normalization]
    for norm in norms:
        lost = torch.ones(norm.num_features, dtype=torch.bool)
        lost[keep] = False
        norm.weight[lost] = 0
        norm.bias[lost] = 0


def test_an_embedder_that_shares_its_channels_with_the_first_stage_is_cut_with_it():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config).eval()
    student = Student(model=model, arch=arch_of(model))
    small = cut(student, replace(student.arch, channels=(5, 5, 16)), ranked(student))
    _silence_stage(model, 0, keep := top(channel_scores(student.family.channel_sources(model, 0)), 5))
    first = model.base_model.encoder.stages[0].layers[0].layer[-1].normalization
    with torch.no_grad():
        lost = torch.tensor([i not in keep.tolist() for i in range(8)])
        first.weight[lost] = 0
        first.bias[lost] = 0
    assert small.arch.channels == (5, 5, 16)
    assert torch.allclose(logits(small, "resnet"), logits(student, "resnet"), atol=1e-5)
    with pytest.raises(ModelError, match="asks for channels 5/7/16, but 5/5/16 is what comes of it"):
        cut(student, replace(student.arch, channels=(5, 7, 16)), ranked(student))


def test_an_ordered_student_stays_ordered_and_its_channels_go_by_their_weights(make_model):
    student = load(make_model, "resnet")
    shape = replace(student.arch, channels=(8, 7, 32))
    small, plain = (cut(each, shape, ranked(student)) for each in (replace(student, ordered=True), student))
    assert small.ordered
    assert not plain.ordered
    assert torch.equal(logits(small, "resnet"), logits(plain, "resnet"))


@pytest.fixture(scope="module")
def slender(make_model):
    """Kind to a student that is narrower in every way."""
    made = {}

    def make(kind: str) -> Student:
        if kind not in made:
            student = load(make_model, kind)
            made[kind] = cut(student, slim(student.arch), ranked(student))
            assert made[kind].arch == slim(student.arch)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", TEXT + VISION + RESNETS)
def test_narrow_models_survive_save_and_load(slender, kind, tmp_path):
    small = slender(kind)
    replace(small, ordered=True).save(tmp_path)
    again = load_student(tmp_path, auto_class=auto_class(kind))
    assert again.arch == small.arch
    assert again.ordered
    assert torch.equal(logits(again, kind), logits(small, kind))


@pytest.mark.parametrize("kind", TEXT + VISION + RESNETS)
def test_narrow_models_say_the_same_as_onnx(slender, kind, tmp_path):
    small = slender(kind)
    task = "text-classification" if kind in TEXT else "image-classification"
    file = export_float(small, task, tmp_path / "model.onnx")
    assert np.abs(run(file, kind) - logits(small, kind).numpy()).max() < 1e-5
    if kind in ("bert", "vit"):
        fused = lower(file, tmp_path / "fused.onnx", "fp32_fused", model_type=kind)
        assert np.abs(run(fused, kind) - logits(small, kind).numpy()).max() < 1e-4
    if kind == "bert":
        operators = [node.op_type for node in onnx.load(fused).graph.node]
        assert operators.count("Attention") == len(small.arch.layers)
        whole = lower(file, tmp_path / "int8.onnx", "int8_dynamic", model_type=kind)
        assert np.abs(run(whole, kind) - logits(small, kind).numpy()).max() < 0.25 * np.ptp(logits(small, kind).numpy())


def run(file, kind: str) -> np.ndarray:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in inputs(kind).items()}
    for value in session.get_inputs():
        feeds.setdefault(value.name, np.zeros((3, 9), np.int64))
    return session.run(None, feeds)[0]


def test_a_smaller_word_table_is_what_the_config_says_after_saving(make_model, tmp_path):
    student = load(make_model, "bert")
    model = copy.deepcopy(student.model)
    model.set_input_embeddings(nn.Embedding.from_pretrained(model.get_input_embeddings().weight[:41].detach()))
    small = student.with_model(model)
    assert small.arch.vocabulary == 41
    small.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 41
    again = load_student(tmp_path, auto_class=auto_class("bert"))
    assert again.arch == small.arch
    assert torch.equal(logits(again, "bert"), logits(student, "bert"))
    config["vocab_size"] = 47
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_student(tmp_path, auto_class=auto_class("bert"))
    assert again.model.config.vocab_size == 41


def test_configs_from_before_stages_had_widths_still_load(make_model, tmp_path):
    student = load(make_model, "resnet")
    cut(student, replace(student.arch, layers=student.arch.layers[:-1]), ranked(student)).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["edgekd"]["arch"].pop("channels") == [8, 16, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_student(tmp_path, auto_class=auto_class("resnet")).arch.channels == (8, 16, 32)


def test_arch_writes_channels_only_where_there_are_some(make_model):
    text, image = load(make_model, "bert").arch, load(make_model, "resnet").arch
    assert "channels" not in text.to_dict()
    assert Arch.from_dict(json.loads(json.dumps(image.to_dict()))) == image
    assert Arch.from_dict(json.loads(json.dumps(text.to_dict()))) == text
    assert image.describe().startswith("5 layers of 8/16/32: ")
    assert text.describe().startswith("3 layers of 32: ")


def test_widths_that_cannot_be_had_are_refused(make_model):
    text, image = load(make_model, "bert"), load(make_model, "resnet")
    for student, changes, message in [
        (text, {"hidden": 33}, "has a hidden size of 32; the plan asks for 33"),
        (text, {"hidden": 0}, "has a hidden size of 32; the plan asks for 0"),
        (text, {"channels": (32,)}, "the family bert have no stages"),
        (image, {"channels": (8, 17, 32)}, "has channels 8/16/32; the plan asks for 8/17/32"),
        (image, {"channels": (8, 32)}, "the plan asks for 8/32"),
        (image, {"channels": (0, 16, 32)}, "the plan asks for 0/16/32"),
        (image, {"channels": (8, 16, 30)}, "a hidden size of 32, but for 30 channels in the last stage"),
        (image, {"hidden": 30}, "a hidden size of 30, but for 32 channels in the last stage"),
    ]:
        with pytest.raises(ModelError, match=message):
            cut(student, replace(student.arch, **changes), ranked(student))
    unscored = replace(ranked(text), hidden=None)
    with pytest.raises(ModelError, match="narrows the hidden size from 32 to 20, but nothing says which channels"):
        cut(text, replace(text.arch, hidden=20), unscored)
    assert cut(image, replace(image.arch, channels=()), ranked(image)).arch == image.arch


def test_a_head_of_unknown_make_is_not_narrowed(make_model):
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(make_model("bert"))
    before = model.base_model.embeddings.word_embeddings.weight.shape
    with pytest.raises(ModelError, match="cannot narrow BertForMaskedLM"):
        family_of("bert").slice_hidden(model, torch.arange(4))
    assert model.base_model.embeddings.word_embeddings.weight.shape == before


@pytest.mark.parametrize("kind", [*TEXT, *VISION, "deit-two-heads"])
def test_a_head_reads_the_first_token_alone_or_is_not_said_to(make_model, kind):
    from transformers import DeiTForImageClassificationWithTeacher

    if kind in TEXT + VISION:
        model = load(make_model, kind).model
    else:
        model = DeiTForImageClassificationWithTeacher.from_pretrained(make_model("deit"))
    family = family_of(model.config.model_type)
    before = logits(model, kind)

    def disturb(module, args, output):
        states = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        states[:, 1:] += torch.randn_like(states[:, 1:])
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    family.layers(model)[-1].register_forward_hook(disturb)
    assert torch.equal(logits(model, kind), before) == family.reads_first(model)
    assert family.reads_first(model) == (kind != "deit-two-heads")


def test_a_distillation_token_has_a_head_that_is_narrowed_too(make_model):
    from transformers import DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher.from_pretrained(make_model("deit")).eval()
    keep = torch.arange(3, 3 + WIDTH)
    masked = silence(model, keep, 32)
    family_of("deit").slice_hidden(model, keep)
    assert torch.allclose(logits(model, "deit"), logits(masked, "deit"), atol=1e-5)


def test_a_net_without_tokens_reads_no_first_one(make_model):
    student = load(make_model, "resnet")
    assert not student.family.reads_first(student.model)
    assert student.family.slice_hidden is None


@pytest.mark.parametrize("kind", TEXT + VISION)
def test_norms_are_the_layers_layer_norms(make_model, kind):
    student = load(make_model, kind)
    for layer in student.family.layers(student.model):
        found = {path for path, module in layer.named_modules() if isinstance(module, nn.LayerNorm)}
        assert found == set(student.family.norms(layer))


class Product(nn.Module):
    """Stands for a linear layer as the product of two."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.first, self.second, self.bias = (nn.Parameter(each) for each in (first, second, bias))
        self.in_features, self.out_features = first.shape[1], second.shape[0]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.first.T @ self.second.T + self.bias

    def rows(self, keep: torch.Tensor) -> Product:
        return Product(self.first.data, self.second.data[keep], self.bias.data[keep])

    def columns(self, keep: torch.Tensor) -> Product:
        return Product(self.first.data[:, keep], self.second.data, self.bias.data)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_modules_that_slice_themselves_are_cut_like_linear_ones(make_model, kind):
    dense = load(make_model, kind)
    thin = load(make_model, kind)
    places = dense.family.places
    paths = [*(f"{places.attention}.{part}" for part in places.qkv), places.attention_output, places.up, places.down]
    for plain, factored in zip(dense.family.layers(dense.model), thin.family.layers(thin.model), strict=True):
        for path in paths:
            linear = plain.get_submodule(path)
            first, second = torch.randn(5, linear.in_features) * 0.2, torch.randn(linear.out_features, 5) * 0.2
            linear.weight.data = second @ first
            parent, _, name = path.rpartition(".")
            setattr(factored.get_submodule(parent), name, Product(first, second, linear.bias.data))
    scores = ranked(dense)
    one = cut(dense, slim(dense.arch), scores)
    two = cut(thin, slim(dense.arch), scores)
    assert isinstance(two.family.layers(two.model)[0].get_submodule(places.up), Product)
    assert torch.allclose(logits(one, kind), logits(two, kind), atol=1e-5)


def test_layers_that_share_attention_keep_the_same_heads(make_model):
    student = load(make_model, "bert")
    heads = (torch.tensor([4.0, 3.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 3.0, 9.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    first, second, third = (replace(layer, heads=2) for layer in student.arch.layers)
    shape = replace(student.arch, layers=(first, replace(second, shares=True), third))
    small = cut(student, shape, replace(ranked(student), heads=heads))
    for layer, own, kept in zip(
        small.family.layers(small.model), student.family.layers(student.model), ([2, 3], [2, 3], [2, 3]), strict=True
    ):
        features = [head * 8 + i for head in kept for i in range(8)]
        assert torch.equal(layer.attention.self.value.weight, own.attention.self.value.weight[features])


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "vit"])
def test_other_operators_are_narrowed_with_the_rest_and_load_again(make_model, kind, tmp_path):
    student = load(make_model, kind)
    first, second, third = student.arch.layers
    layers = (
        replace(first, rank=6, activation="relu"),
        replace(second, shares=True),
        replace(third, tokens=1, norm="affine"),
    )
    scores = ranked(student)
    other = cut(student, replace(student.arch, layers=layers), scores)
    assert other.arch.layers == layers
    shape = replace(other.arch, hidden=WIDTH, layers=tuple(replace(layer, heads=3, neurons=40) for layer in layers))
    small = cut(other, shape, scores)
    assert small.arch == shape
    small.save(tmp_path)
    again = load_student(tmp_path, auto_class=auto_class(kind))
    assert again.arch == shape
    assert torch.equal(logits(again, kind), logits(small, kind))
