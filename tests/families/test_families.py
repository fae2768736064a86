from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from edgekd.arch import Arch
from edgekd.errors import ModelError
from edgekd.families import FAMILIES
from edgekd.student import Student, load_student
from edgekd.surgery import Importance, cut
from edgekd.surgery.importance import top

TEXT = ["bert", "roberta", "xlm-roberta", "electra", "electra-wide", "distilbert"]
IMAGE = ["vit", "deit", "resnet", "resnet-bottleneck"]
KINDS = TEXT + IMAGE


def load(make_model, kind: str) -> Student:
    return load_student(make_model(kind), auto_class=auto_class(kind))


def auto_class(kind: str) -> str:
    return f"AutoModelFor{'Sequence' if kind in TEXT else 'Image'}Classification"


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind in IMAGE:
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(5, 40, (3, 9), generator=generator), "attention_mask": mask}


def logits(student: Student, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return student.model.eval()(**inputs(kind)).logits


def ranked(student: Student, seed: int = 0) -> Importance:
    """Random scores, so that what is kept is no prefix."""
    generator = torch.Generator().manual_seed(seed)
    heads = tuple(torch.rand(layer.heads, generator=generator) for layer in student.arch.layers)
    neurons = tuple(torch.rand(layer.neurons, generator=generator) for layer in student.arch.layers)
    return Importance(heads, neurons, torch.ones(len(heads)))


def narrowed(arch: Arch) -> Arch:
    """A different shape in every layer."""
    layers = tuple(
        replace(layer, heads=max(layer.heads - 1 - i % 2, min(layer.heads, 1)), neurons=layer.neurons // 2 + i)
        for i, layer in enumerate(arch.layers)
    )
    return replace(arch, layers=layers)


def test_every_family_and_every_type_of_model_has_a_tiny_one_here(make_model):
    types = {json.loads((make_model(kind) / "config.json").read_text())["model_type"] for kind in KINDS}
    assert types == {name for family in FAMILIES.values() for name in family.model_types}


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_shape_changes_nothing(make_model, kind):
    student = load(make_model, kind)
    assert torch.equal(logits(cut(student, student.arch, ranked(student)), kind), logits(student, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_slicing_equals_masking(make_model, kind):
    student = load(make_model, kind)
    scores, shape = ranked(student), narrowed(student.arch)
    small = cut(student, shape, scores)
    assert small.arch == shape
    assert sum(p.numel() for p in small.model.parameters()) < sum(p.numel() for p in student.model.parameters())
    _mask(student, shape, scores)
    assert (logits(small, kind) - logits(student, kind)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_a_layer_out_equals_passing_it_by(make_model, kind):
    student = load(make_model, kind)
    place = max(i for i in range(len(student.arch.layers)) if student.family.droppable(student.model, i))
    layers = tuple(layer for i, layer in enumerate(student.arch.layers) if i != place)
    small = cut(student, replace(student.arch, layers=layers), ranked(student))

    def pass_by(module, args, kwargs, output):
        states = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    before = logits(student, kind)
    student.family.layers(student.model)[place].register_forward_hook(pass_by, with_kwargs=True)
    assert not torch.allclose(logits(student, kind), before, atol=1e-5)
    assert (logits(small, kind) - logits(student, kind)).abs().max() < 1e-5


def _mask(student: Student, shape: Arch, scores: Importance) -> None:
    """Silence what the cut removes, by zeroing the columns that read it."""
    family = student.family
    for i, layer in enumerate(family.layers(student.model)):
        dropped = torch.argsort(scores.neurons[i], descending=True, stable=True)[shape.layers[i].neurons :]
        convolutions = getattr(layer, "layer", None)
        if convolutions is not None:
            family.align(layer, top(scores.neurons[i], shape.layers[i].neurons))
            for block in list(convolutions)[1:]:
                block.convolution.weight.data[:, dropped] = 0
            continue
        family.neuron_input(layer).weight.data[:, dropped] = 0
        lost = torch.argsort(scores.heads[i], descending=True, stable=True)[shape.layers[i].heads :]
        for head in lost.tolist():
            size = student.arch.head_dim
            family.head_input(layer).weight.data[:, head * size : (head + 1) * size] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_non_uniform_shapes_survive_save_and_load(make_model, kind, tmp_path):
    student = load(make_model, kind)
    droppable = [student.family.droppable(student.model, i) for i in range(len(student.arch.layers))]
    shape = narrowed(student.arch)
    last = max(i for i, able in enumerate(droppable) if able)
    shape = replace(shape, layers=tuple(layer for i, layer in enumerate(shape.layers) if i != last))
    small = replace(cut(student, shape, ranked(student)), plan=shape, quantization={"lowering": "int8_dynamic"})
    small.save(tmp_path)
    again = load_student(tmp_path, auto_class=auto_class(kind))
    assert again.arch == shape == again.plan
    assert again.quantization == {"lowering": "int8_dynamic"}
    assert torch.equal(logits(again, kind), logits(small, kind))


@torch.no_grad()
def test_both_groups_of_a_bottleneck_keep_what_counts(make_model):
    """Half of each group is dead, and not the same half."""
    student = load(make_model, "resnet-bottleneck")
    scores, shape = [], []
    for layer, own in zip(student.family.layers(student.model), student.arch.layers, strict=True):
        half = own.neurons // 2
        for block, dead in ((layer.layer[0], slice(0, half)), (layer.layer[1], slice(half, None))):
            block.normalization.weight[dead] = 0
            block.normalization.bias[dead] = 0
        scores.append((torch.arange(own.neurons) < half).float())
        shape.append(replace(own, neurons=own.neurons - half))
    importance = replace(ranked(student), neurons=tuple(scores))
    small = cut(student, replace(student.arch, layers=tuple(shape)), importance)
    assert (logits(small, "resnet-bottleneck") - logits(student, "resnet-bottleneck")).abs().max() < 1e-5


def test_a_block_that_changes_sizes_cannot_be_left_out(make_model):
    student = load(make_model, "resnet")
    fixed = [i for i in range(len(student.arch.layers)) if not student.family.droppable(student.model, i)]
    for index in fixed:
        kept = tuple(layer for i, layer in enumerate(student.arch.layers) if i != index)
        with pytest.raises(ModelError, match=f"layer {index} .* cannot be left out"):
            cut(student, replace(student.arch, layers=kept), ranked(student))
    assert fixed


def test_heads_that_transformers_pruned_are_not_pruned_again(make_model, tmp_path):
    folder = tmp_path / "pruned"
    model = AutoModelForSequenceClassification.from_pretrained(make_model("bert"))
    model.bert.config.pruned_heads = {1: [0], 2: [1, 2]}
    for index, heads in model.bert.config.pruned_heads.items():
        model.bert.encoder.layer[index].attention.prune_heads(set(heads))
    model.save_pretrained(folder)
    for file in make_model("bert").glob("*"):
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    student = load_student(folder, auto_class=auto_class("bert"))
    assert [layer.heads for layer in student.arch.layers] == [4, 3, 2]
    shape = replace(student.arch, layers=(student.arch.layers[0], student.arch.layers[2]))
    small = cut(student, shape, ranked(student))
    small.save(tmp_path / "small")
    again = load_student(tmp_path / "small", auto_class=auto_class("bert"))
    assert again.arch == shape
    assert torch.equal(logits(again, "bert"), logits(small, "bert"))


def test_a_cut_of_a_cut_refers_to_the_teachers_layers(make_model):
    student = load(make_model, "bert")
    once = cut(student, replace(student.arch, layers=student.arch.layers[1:]), ranked(student))
    assert [layer.source for layer in once.arch.layers] == [1, 2]
    twice = cut(once, replace(once.arch, layers=once.arch.layers[1:]), ranked(once))
    assert [layer.source for layer in twice.arch.layers] == [2]


def test_cut_refuses_what_the_model_does_not_have(make_model):
    student = load(make_model, "bert")
    layer = student.arch.layers[0]
    for layers, message in [
        ((replace(layer, heads=9),), "layer 0 has 4 heads and 64 neurons; the plan asks for 9"),
        ((replace(layer, source=7),), "the plan keeps layer 7, but the model has layers"),
        ((layer, layer), "each once and in order"),
        ((replace(layer, neurons=0),), "asks for 4 and 0"),
    ]:
        with pytest.raises(ModelError, match=message):
            cut(student, replace(student.arch, layers=layers), ranked(student))


def test_unusable_folders_are_refused_with_the_reason(make_model, tmp_path):
    auto = {"auto_class": "AutoModelForSequenceClassification"}
    with pytest.raises(ModelError, match="has no config.json"):
        load_student(tmp_path, **auto)
    config = json.loads((make_model("bert") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has no weights: model.safetensors is missing"):
        load_student(tmp_path, **auto)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="only pickled weights"):
        load_student(tmp_path, **auto)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_student(tmp_path, **auto)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="cannot compress models of type 'gpt2' yet; it knows bert"):
        load_student(tmp_path, **auto)
    with pytest.raises(ModelError, match="no model folder at './nowhere'"):
        load_student("./nowhere", **auto)


def test_weights_that_do_not_fit_the_stated_shape_are_refused(make_model, tmp_path):
    student = load(make_model, "bert")
    cut(student, narrowed(student.arch), ranked(student)).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["edgekd"]["arch"]["layers"][0]["neurons"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_student(tmp_path, auto_class="AutoModelForSequenceClassification")


def test_a_base_model_without_a_head_is_refused(make_model, tmp_path):
    from transformers import BertModel

    BertModel.from_pretrained(make_model("bert")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a finished model of this task; train one first with `edgekd finetune`"):
        load_student(tmp_path, auto_class="AutoModelForSequenceClassification")
