"""What a sparse student is worth, promises and keeps: saved, exported, quantized, finetuned by strangers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import nn

from edgekd import constraints
from edgekd.cli import main
from edgekd.context import Silent
from edgekd.errors import ModelError, RecipeError
from edgekd.export.names import module_of
from edgekd.families.zeros import lost_zeros
from edgekd.pipeline import artifact
from edgekd.pipeline.artifact import Place, build
from edgekd.prune import Prune
from edgekd.quantize import Quantize
from edgekd.quantize.fake import Scheme
from edgekd.recipe import load_recipe
from edgekd.sparsify import Sparsify
from edgekd.student import load_student
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target

ONE_SHOT = {"epochs": 0, "calibration": 16}
AUTO = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def sparse(setup, tmp_path_factory) -> Any:
    from edgekd.context import Budget, Context, Silent
    from edgekd.target import load_target

    folder = tmp_path_factory.mktemp("sparse")
    ctx = Context(
        teacher=setup.teacher, task=setup.task, processor=setup.processor, train=setup.train, test=None,
        validation=setup.validation, target=load_target("local"), budget=Budget(sequence=16, threads=1),
        work=folder / "work", cache=folder / "cache", progress=Silent(),
    )  # fmt: skip
    return Sparsify(**ONE_SHOT, pattern="2:4").run(setup.teacher, ctx)


def zeros(student: Any) -> dict[str, np.ndarray]:
    return {name: (student.model.get_submodule(name).weight == 0).numpy() for name in student.sparsity["layers"]}


def test_zeros_live_through_saving_and_loading(sparse, tmp_path):
    sparse.save(tmp_path / "s")
    again = load_student(tmp_path / "s", auto_class=AUTO)
    assert again.sparsity == sparse.sparsity
    for name, mask in zeros(sparse).items():
        assert np.array_equal(zeros(again)[name], mask)
    section = json.loads((tmp_path / "s" / "config.json").read_text())["edgekd"]["sparsity"]
    assert (section["pattern"], section["density"], section["storage"]) == ("2:4", 0.5, "dense")
    assert section["layers"]["bert.encoder.layer.0.attention.self.query"] == 512


@pytest.mark.parametrize("form", ["fp32_fused", "int8_dynamic_fused", "int8_dynamic_lean", "int8_qdq"])
def test_zeros_are_integers_0_in_every_form(sparse, setup, tmp_path, form):
    from edgekd.context import Budget
    from edgekd.target import load_target

    place = Place(target=load_target("local"), budget=Budget(sequence=16), calibration=setup.train)
    file = build(sparse, setup.task, setup.validation, tmp_path, lowering=form, place=place, gate=False).file
    graph = onnx.load(file).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inside = [value for name, value in values.items() if value.ndim == 2 and value.size in (1024, 2048, 3072)]
    assert sum(value.size for value in inside) == sum(mask.size for mask in zeros(sparse).values()) + 1024  # the pooler
    promised = sum(sparse.sparsity["layers"].values())
    assert sum(int((value == 0).sum()) for value in inside) >= promised
    if form.startswith("int8"):
        assert {str(value.dtype) for value in inside} == {"int8"}
        assert all(not value.any() for name, value in values.items() if value.dtype == np.int8 and "zero_point" in name)
    expected, found = zeros(sparse), 0
    for node in graph.node:
        for name in node.input:
            if module_of(node) in expected and getattr(values.get(name), "ndim", 0) == 2:
                mask = expected[module_of(node)]
                assert not values[name].T[mask].any()
                found += 1
    assert found >= 6 or form == "int8_qdq"


@pytest.mark.parametrize("form", ["int8_weights", "int4_weights"])
def test_zeros_are_zeros_in_groups_too(form):
    from edgekd.export.nbits import grid_of_form, nearest

    grid, _ = grid_of_form(form)
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32) + 0.5
    weight[:, ::2] = 0
    assert not nearest(weight, grid).values()[:, ::2].any()


def test_a_stock_trainer_loses_the_zeros_and_loading_says_so(sparse, setup, tmp_path):
    """What transformers' Trainer does: a step of AdamW on all weights, save_pretrained."""
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    sparse.save(tmp_path / "s")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s")
    batch = setup.train.collate(np.arange(8))
    rows = [{name: value[i] for name, value in batch.items()} | {"labels": torch.tensor(i % 2)} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tuned" / name).write_bytes((tmp_path / "s" / name).read_bytes())
    with pytest.raises(ModelError, match="18 of 18 matrices have lost the zeros that config.json promises") as raised:
        load_student(tmp_path / "tuned", auto_class=AUTO)
    said = str(raised.value)
    assert re.search(r"bert\.encoder\.layer\.0\.attention\.self\.query has 0\.0% zeros, not 50\.0%", said)
    assert "and 15 more" in said
    done = CliRunner().invoke(main, ["export", str(tmp_path / "tuned"), "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 2
    assert "lost the zeros" in done.output


def test_one_matrix_that_lost_a_zero_is_named(sparse):
    changed = replace(sparse, model=load_model_like(sparse))
    with torch.no_grad():
        weight = changed.model.bert.encoder.layer[1].output.dense.weight
        weight[weight == 0] = torch.where(torch.arange(1024) == 7, 1e-8, 0.0)
    said = lost_zeros(changed.model, sparse.sparsity)
    assert said.startswith("1 of 18 matrices have lost")
    assert "bert.encoder.layer.1.output.dense has 49.9% zeros, not 50.0%" in said or "50.0% zeros" in said
    assert lost_zeros(sparse.model, sparse.sparsity) == ""
    assert lost_zeros(sparse.model, None) == ""
    gone = {**sparse.sparsity, "layers": {"bert.encoder.layer.9.output.dense": 3}}
    assert "bert.encoder.layer.9.output.dense is gone" in lost_zeros(sparse.model, gone)


def load_model_like(student: Any) -> Any:
    import copy

    return copy.deepcopy(student.model)


def test_tied_weights_are_refused_with_their_names(setup, ctx):
    student = replace(setup.teacher, model=load_model_like(setup.teacher))
    layers = student.model.bert.encoder.layer
    layers[2].output.dense.weight = layers[0].output.dense.weight
    with pytest.raises(
        ModelError, match=r"layer\.0\.output\.dense, .*layer\.2\.output\.dense: these weights are shared"
    ):
        Sparsify(**ONE_SHOT).run(student, ctx)
    dense = ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.2.output.dense")
    made = Sparsify(**ONE_SHOT, dense=dense).run(student, ctx)
    assert len(made.sparsity["layers"]) == 16
    layers[1].attention.self.key = layers[1].attention.self.query
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.self\.query: these weights are shared"):
        Sparsify(**ONE_SHOT, dense=dense).run(student, ctx)


def test_widths_that_do_not_divide_are_refused_with_their_names(setup, ctx):
    arch = setup.teacher.arch
    layers = [replace(layer, neurons=n) for layer, n in zip(arch.layers, (64, 30, 36), strict=True)]
    student = cut(setup.teacher, replace(arch, layers=tuple(layers)), importance(setup))
    with pytest.raises(ModelError) as raised:
        Sparsify(**ONE_SHOT, pattern="4:8").run(student, ctx)
    assert "the pattern 4:8 does not fit 2 of 18 matrices" in str(raised.value)
    assert "bert.encoder.layer.1.output.dense: its 30 inputs are not a multiple of 8" in str(raised.value)
    with pytest.raises(ModelError, match="layer.1.intermediate.dense: its 30 outputs are not a multiple of 4"):
        Sparsify(**ONE_SHOT, pattern="4x1").run(student, ctx)
    dense = ("bert.encoder.layer.1.output.dense", "bert.encoder.layer.2.output.dense")
    assert len(Sparsify(**ONE_SHOT, pattern="4:8", dense=dense).run(student, ctx).sparsity["layers"]) == 16
    with pytest.raises(ModelError, match="dense: unknown module 'bert.encoder.layer.1.output'"):
        Sparsify(**ONE_SHOT, dense=("bert.encoder.layer.1.output",)).run(student, ctx)


def importance(setup: Any) -> Any:
    return measure_importance(setup.teacher, sample_batches(setup.train, 16, seed=0))


def test_pruned_shapes_become_sparse_and_can_be_loaded(setup, ctx, tmp_path):
    pruned = Prune(layers=[0, 2], heads=[2, 3], neurons=[40, 24], samples=16).run(setup.teacher, ctx)
    made = Sparsify(epochs=1, batch_size=8, calibration=16, precision="fp32", pattern="unstructured", sparsity=0.6).run(
        pruned, ctx
    )
    made.save(tmp_path / "s")
    again = load_student(tmp_path / "s", auto_class=AUTO)
    assert again.sparsity["density"] == pytest.approx(0.4, abs=0.01)
    assert {again.model.get_submodule(name).weight.shape[0] for name in again.sparsity["layers"]} == {16, 24, 32, 40}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_too(make_model, kind):
    from edgekd.sparsify.masked import Masks
    from edgekd.sparsify.patterns import PATTERNS
    from edgekd.sparsify.plan import make_plan

    student = load_student(make_model(kind), auto_class="AutoModelForImageClassification")
    batches = [{"pixel_values": torch.randn(8, 1, 8, 8)}]
    plan = make_plan(Sparsify(pattern="2:4", calibration=8), student, PATTERNS["2:4"], batches)
    masks = Masks.install(plan.modules)
    plan.cut(masks, 1.0)
    masks.finish()
    assert masks.sparsity == 0.5
    for module in plan.modules.values():
        weight = module.weight.movedim(1, -1)
        groups = weight.reshape(len(weight), -1, 4)
        assert bool(((groups != 0).sum(-1) == 2).all()), "along the channels"
    assert not any("embedder" in name or "classifier" in name for name in plan.modules)


def test_a_student_trained_under_rounding_stays_under_it(setup, ctx, tmp_path):
    trained = {"batch_size": 8, "calibration": 16, "precision": "fp32", "epochs": 1}
    quantized = Quantize(lowering="int8_dynamic", force=True, tolerance=0.9, **trained).run(setup.teacher, ctx)
    assert quantized.quantization["scheme"]["weight_bits"] == 8
    made = Sparsify(**trained, pattern="2:4").run(quantized, replace(ctx, work=tmp_path))
    assert made.quantization["scheme"] == quantized.quantization["scheme"]
    for name in made.sparsity["layers"]:
        weight = made.model.get_submodule(name).weight.detach()
        steps = weight / (weight.abs().amax(1, keepdim=True) / 127)
        assert torch.allclose(steps, steps.round(), atol=1e-3), "weights lie on the grid"
        assert bool(((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all())
    made.save(tmp_path / "s")
    assert load_student(tmp_path / "s", auto_class=AUTO).sparsity == made.sparsity


def test_ranges_found_before_are_found_again(setup, ctx):
    quantization = {"lowering": "int8_qdq", "ranges": {"a": [0, 1]}, "seed": 5}
    made = Sparsify(**ONE_SHOT).run(replace(setup.teacher, quantization=quantization), ctx)
    assert made.quantization == {"lowering": "int8_qdq", "seed": 5, "calibration": 128}


@pytest.mark.parametrize("epochs", [0, 1])
def test_ranges_that_training_found_are_where_it_starts(setup, ctx, epochs):
    student = load_student(setup.teacher.processor_dir, auto_class=AUTO)
    quick = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-4}
    static = Quantize(lowering="int8_static", activations="static", learned=True, tolerance=0.9, **quick)
    student = static.run(setup.teacher, ctx)
    far = {name: [low - 50, high + 50] for name, (low, high) in student.quantization["activations"].items()}
    student = replace(student, quantization={**student.quantization, "activations": far})
    made = Sparsify(**{**quick, "epochs": epochs}, masks="fixed", calibration=16, pattern="2:4").run(student, ctx)
    assert made.quantization["learned"]
    for name, (low, high) in made.quantization["activations"].items():
        assert low < far[name][0] / 2
        assert high > far[name][1] / 2
        assert epochs or [low, high] == pytest.approx(far[name])


def test_the_observer_of_the_ranges_is_asked_again(setup, ctx, tmp_path, monkeypatch):
    quantize = Quantize(lowering="int8_static", observer="percentile", calibration=24, tolerance=0.9)
    made = Sparsify(**ONE_SHOT).run(quantize.run(setup.teacher, ctx), ctx)
    asked = []
    find = artifact.find_ranges
    monkeypatch.setattr(artifact, "find_ranges", lambda *given, **named: asked.append(named) or find(*given, **named))
    place = Place(target=ctx.target, budget=ctx.budget, calibration=ctx.train)
    build(made, setup.task, setup.validation, tmp_path, place=place, gate=False)
    assert asked == [{"observer": "percentile"}]
    assert made.quantization["calibration"] == 24


def test_weights_that_were_fitted_to_a_grid_are_rounded_again(setup, ctx, tmp_path):
    said = []
    ctx = replace(ctx, progress=type("Heard", (Silent,), {"say": lambda self, text: said.append(text)})())
    fitted = Quantize(lowering="int4_weights", rounding="adaptive", group=16, tolerance=0.9).run(setup.teacher, ctx)
    assert fitted.quantization["weights"]["method"] == "gptq"
    made = Sparsify(**ONE_SHOT).run(fitted, ctx)
    assert any("export rounds to nearest" in text for text in said)
    assert build(made, setup.task, setup.validation, tmp_path, gate=False).file.is_file()


def test_the_teacher_must_read_the_same_tokens(setup, ctx):
    other = replace(setup.teacher, arch=replace(setup.teacher.arch, vocabulary=99))
    with pytest.raises(ModelError, match="the student knows 99 words and the teacher 47"):
        Sparsify(**ONE_SHOT, teacher="teacher").run(other, ctx)
    assert Sparsify(**ONE_SHOT, teacher="teacher").run(setup.teacher, ctx).sparsity


def test_a_student_that_drops_tokens_is_trained_without_states(setup, ctx):
    """The dense student and the sparse one keep other tokens, so that nothing but logits can be compared."""
    layers = setup.teacher.arch.layers
    shape = replace(setup.teacher.arch, layers=(replace(layers[0], tokens=5), *layers[1:]))
    importance = measure_importance(setup.teacher, sample_batches(ctx.train, 16, seed=0))
    short = cut(setup.teacher, shape, importance)
    settings = {"pattern": "2:4", "calibration": 16, "epochs": 1, "method": "magnitude"}
    assert Sparsify(**settings).run(short, ctx).sparsity["pattern"] == "2:4"
    with pytest.raises(RecipeError, match="share none"):
        Sparsify(**settings, losses={"squarehead": 1.0}).run(short, ctx)


def test_the_command_makes_a_sparse_folder_and_speaks_up(make_model, text_data, tmp_path):
    out = tmp_path / "sparse"
    common = ["sparsify", str(make_model("bert")), "--data", str(text_data), "--threads", "1", "--sequence", "16"]
    settings = ["--set", "pattern=2:4", "--set", "epochs=0", "--set", "calibration=16"]
    done = CliRunner().invoke(main, [*common, *settings, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "zeros in the pattern 2:4 are not known to pay on target local (no pattern does)" in done.output
    assert load_student(out, auto_class=AUTO).sparsity["pattern"] == "2:4"
    done = CliRunner().invoke(main, [*common, "--set", "pattern=2:5", "--out", str(tmp_path / "no")])
    assert done.exit_code == 2
    assert "(did you mean '2:4'?)" in done.output


def test_another_stage_after_it_gives_up_the_promise_and_says_so(sparse, text_data, tmp_path):
    sparse.save(tmp_path / "s")
    settings = ["--set", "epochs=1", "--set", "batch_size=32", "--out", str(tmp_path / "d")]
    folder = str(tmp_path / "s")
    done = CliRunner().invoke(main, ["distill", folder, "--teacher", folder, "--data", str(text_data), *settings])
    assert done.exit_code == 0, done.output
    assert "the zeros of a sparse model did not live through this stage" in done.output
    assert load_student(tmp_path / "d", auto_class=AUTO).sparsity is None


def test_a_recipe_has_it_last(make_model, text_data):
    def load(stages: list[Any]) -> Any:
        values = {"teacher": str(make_model("bert")), "data": {"path": str(text_data)}, "budget": {"size_mb": 10}}
        return load_recipe("balanced", values={**values, "stages": stages})

    quantize = {"quantize": {"lowering": "int8_dynamic"}}
    assert list(load([quantize, {"sparsify": {"pattern": "2:4"}}]).stages) == ["quantize", "sparsify"]
    with pytest.raises(RecipeError, match="expected the order quantize, sparsify; got sparsify, quantize"):
        load([{"sparsify": {}}, quantize])
    with pytest.raises(RecipeError, match=r"stages\.sparsify\.pattern: .*2:4"):
        load([{"sparsify": {"pattern": "2:3"}}])
    with pytest.raises(RecipeError, match="sparsity must be left out or 0.5"):
        load([{"sparsify": {"pattern": "2:4", "sparsity": 0.9}}])


def test_modules_that_are_not_matrices_stay(sparse, setup):
    for name, module in sparse.model.named_modules():
        if isinstance(module, nn.Embedding | nn.LayerNorm) or name in ("classifier", "bert.pooler.dense"):
            assert torch.equal(module.weight, setup.teacher.model.get_submodule(name).weight), name


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"masks": "adaptive"}])
def test_a_boost_is_saved_loaded_and_exported(setup, ctx, tmp_path, changes):
    settings = {"epochs": 1, "batch_size": 8, "calibration": 16, "precision": "fp32", "pattern": "2:4", "boost": 8}
    made = Sparsify(**{**settings, **changes}).run(setup.teacher, ctx)
    boosted = made.model.bert.encoder.layer[0].attention.self.query
    assert boosted.blocks.weight.shape == (32, 4)
    assert bool((boosted.blocks.weight != 0).any())
    made.save(tmp_path / "s")
    again = load_student(tmp_path / "s", auto_class=AUTO)
    assert "bert.encoder.layer.0.attention.self.query.linear" in again.sparsity["layers"]
    batch = setup.validation.collate(np.arange(4))
    batch.pop("labels", None)
    with torch.no_grad():
        assert torch.equal(made.model(**batch).logits, again.model(**batch).logits)
    artifact = build(again, setup.task, setup.validation, tmp_path / "onnx")
    assert artifact.parity.max_abs < 1e-3
    nodes = onnx.load(artifact.file).graph.node
    assert sum(node.op_type in ("MatMul", "Gemm") and "/blocks/" in node.name for node in nodes) == 18


def test_a_boost_computes_what_one_dense_matrix_would():
    from edgekd.families.boost import Boosted

    torch.manual_seed(0)
    boosted, x = Boosted(nn.Linear(12, 5), nn.Linear(3, 5, bias=False)), torch.randn(2, 7, 12)
    assert torch.allclose(boosted(x), nn.functional.linear(x, boosted.weight, boosted.bias), atol=1e-6)
    assert torch.allclose(boosted.rows(torch.tensor([3, 1]))(x), boosted(x)[..., [3, 1]], atol=1e-6)
    with pytest.raises(ModelError, match="prune before sparsify"):
        boosted.columns(torch.tensor([0]))


def test_a_boost_makes_up_for_what_was_lost():
    from edgekd.families.boost import Boosted
    from edgekd.sparsify.boost import make_up
    from edgekd.sparsify.oneshot import output_error

    torch.manual_seed(0)
    lost, x = torch.randn(5, 12), torch.randn(200, 12) + 2
    gram = (x.T @ x).double()
    left = {}
    for name, given in (("mean", torch.zeros(0)), ("fitted", gram)):
        boosted = Boosted(nn.Linear(12, 5), nn.Linear(3, 5, bias=False))
        nn.init.zeros_(boosted.blocks.weight)
        make_up(boosted, lost, given)
        left[name] = output_error(lost, boosted.blocks.weight.detach().repeat_interleave(4, 1), gram)
        if name == "mean":
            assert torch.allclose(boosted.blocks.weight, lost.view(5, 3, 4).mean(-1))
    assert left["fitted"] < left["mean"] < 0.9


def boosted_student(setup, make_ctx, folder, name, **changes):
    settings = {"epochs": 0, "calibration": 16, "pattern": "2:4", "boost": 8, **changes}
    made = Sparsify(**settings).run(setup.teacher, make_ctx(work=folder / f"work-{name}"))
    made.save(folder / name)
    return load_student(folder / name, auto_class=AUTO)


def test_a_boost_goes_on_where_its_zeros_do_not(setup, make_ctx, text_data, tmp_path):
    student = boosted_student(setup, make_ctx, tmp_path, "s")
    folder, out = str(tmp_path / "s"), tmp_path / "d"
    words = ["distill", folder, "--teacher", folder, "--data", str(text_data), "--out", str(out)]
    done = CliRunner().invoke(main, [*words, "--set", "epochs=1", "--set", "batch_size=32"])
    assert done.exit_code == 0, done.output
    again = load_student(out, auto_class=AUTO)
    assert again.sparsity is None
    assert type(again.model.bert.encoder.layer[0].attention.self.query).__name__ == "Boosted"
    with pytest.raises(ModelError, match="has a boost over 8 inputs from an earlier sparsify"):
        Sparsify(**ONE_SHOT, pattern="2:4", boost=8).run(student, make_ctx(work=tmp_path / "w1"))
    sparser = Sparsify(**ONE_SHOT, pattern="1:4").run(student, make_ctx(work=tmp_path / "w2"))
    assert sparser.sparsity["density"] == 0.25


def test_folders_that_have_the_boost_beside_the_zeros_still_load(setup, make_ctx, tmp_path):
    boosted_student(setup, make_ctx, tmp_path, "s")
    file = tmp_path / "s" / "config.json"
    config = json.loads(file.read_text())
    config["edgekd"]["sparsity"]["boost"] = config["edgekd"].pop("boost")
    file.write_text(json.dumps(config))
    again = load_student(tmp_path / "s", auto_class=AUTO)
    assert again.model.bert.encoder.layer[0].attention.self.query.inputs == 8


def test_a_boost_and_rounding_go_together(setup, make_ctx, tmp_path):
    rounded = replace(setup.teacher, quantization={"lowering": "int8_dynamic", "scheme": Scheme().to_dict()})
    settings = {"epochs": 1, "batch_size": 16, "calibration": 16, "precision": "fp32", "pattern": "2:4", "boost": 8}
    made = Sparsify(**settings, masks="adaptive").run(rounded, make_ctx(work=tmp_path / "w"))
    blocks = made.model.bert.encoder.layer[0].attention.self.query.blocks
    assert bool((blocks.weight != 0).any())
    assert not lost_zeros(made.model, made.sparsity)


def test_a_pattern_that_the_target_chooses_has_its_own_share_of_zeros(setup, make_ctx, text_data, tmp_path):
    gpu = replace(load_target("local"), name="gpu", sparsity=("2:4",))
    with pytest.raises(RecipeError, match="0.5 with the pattern 2:4, which target gpu profits from"):
        Sparsify(**ONE_SHOT, sparsity=0.75).run(setup.teacher, make_ctx(target=gpu))
    [mistake] = constraints._zeros(gpu, {"sparsify": Sparsify(sparsity=0.75)})
    assert mistake.at == ("stages", 0, "sparsify", "sparsity")
    assert not list(constraints._zeros(gpu, {"sparsify": Sparsify(sparsity=0.5)}))
    assert not list(constraints._zeros(gpu, {"sparsify": Sparsify(sparsity=0.75, pattern="unstructured")}))


def test_a_boost_that_does_not_divide_is_refused(setup, ctx):
    with pytest.raises(ModelError, match=r"boost sums every 24 inputs, and the inputs of .*query \(32\)"):
        Sparsify(**ONE_SHOT, boost=24).run(setup.teacher, ctx)
