from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekd.arch import Arch, Layer
from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec
from edgekd.errors import ModelError, RecipeError
from edgekd.families import arch_of
from edgekd.pipeline.setup import prepare
from edgekd.prune import CRITERIA, Prune
from edgekd.prune.plan import plan_from_settings
from edgekd.prune.rounds import gradual
from edgekd.student import load_student
from edgekd.surgery import criteria, cut
from edgekd.surgery.importance import in_order
from edgekd.surgery.reconstruct import output_errors
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target
from edgekd.tasks import get_task


@pytest.fixture(scope="module")
def setup(make_model, text_data):
    return prepare(make_model("bert"), DataSpec(path=str(text_data)), progress=Silent())


@pytest.fixture
def ctx(setup, tmp_path):
    return Context(
        teacher=setup.teacher,
        task=setup.task,
        processor=setup.processor,
        train=setup.train,
        validation=setup.validation,
        test=None,
        target=load_target("local"),
        budget=Budget(),
        work=tmp_path / "work",
        cache=tmp_path / "cache",
        progress=Silent(),
    )


ARCH = Arch(
    family="bert",
    hidden=64,
    head_dim=8,
    vocabulary=100,
    layers=tuple(Layer(source=i, heads=8, neurons=256) for i in range(6)),
)


def state(student) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in student.model.state_dict().items()}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_stated_shape_is_cut(setup, ctx, criterion):
    stage = Prune(criterion=criterion, samples=16, layers=[0, 2], heads=[2, 1], neurons=24, hidden=16)
    before = state(setup.teacher)
    small = stage.run(setup.teacher, ctx)
    assert [(each.source, each.heads, each.neurons) for each in small.arch.layers] == [(0, 2, 24), (2, 1, 24)]
    assert small.arch.hidden == 16
    assert arch_of(small.model, (0, 2)) == small.arch
    assert small.plan is None
    assert ctx.notes["shape"] == small.arch.describe()
    assert ctx.notes["reconstruct"] == "no: the hidden state was narrowed"
    assert all(torch.equal(values, before[name]) for name, values in state(setup.teacher).items())
    with torch.no_grad():
        assert torch.isfinite(small.model(**ctx.train.collate(np.arange(4))).logits).all()


def test_the_plan_is_cut_and_reconstructed(setup, ctx):
    layers = tuple(replace(layer, heads=2, neurons=16) for layer in setup.teacher.arch.layers)
    plan = replace(setup.teacher.arch, layers=layers)
    planned = replace(setup.teacher, plan=plan)
    fitted, plain = Prune().run(planned, ctx), Prune(reconstruct=False).run(planned, replace(ctx, notes={}))
    assert fitted.arch == plain.arch == plan
    assert ctx.notes["reconstruct"] == "yes"
    batches = sample_batches(ctx.train, 96, seed=0)
    better, worse = output_errors(setup.teacher, fitted, batches), output_errors(setup.teacher, plain, batches)
    assert sum(better) < 0.9 * sum(worse)
    weight = setup.teacher.model.base_model.encoder.layer[0].output.dense.weight
    kept = plain.model.base_model.encoder.layer[0].output.dense.weight
    assert all(any(torch.equal(column, own) for own in weight.T) for column in kept.T)


def test_what_stays_is_fitted_before_other_operators_are_installed(setup, ctx):
    layers = tuple(replace(layer, heads=2, neurons=16) for layer in setup.teacher.arch.layers)
    plan = replace(setup.teacher.arch, layers=layers)
    changed = replace(plan, layers=tuple(replace(layer, activation="relu") for layer in layers))
    fitted = Prune().run(replace(setup.teacher, plan=plan), ctx)
    other = Prune().run(replace(setup.teacher, plan=changed), ctx)
    assert other.arch == changed
    assert ctx.notes["reconstruct"] == "yes"
    assert all(torch.equal(values, state(fitted)[name]) for name, values in state(other).items())


def test_layers_that_go_have_no_say_in_what_stays(setup, ctx, monkeypatch):
    from edgekd.prune import rounds

    seen = []
    measure = rounds.measure_importance
    monkeypatch.setattr(
        rounds,
        "measure_importance",
        lambda student, *rest, **how: seen.append(student.arch) or measure(student, *rest, **how),
    )
    Prune(layers=[0, 2], neurons=16).run(setup.teacher, ctx)
    assert [[layer.source for layer in arch.layers] for arch in seen] == [[0, 2]]
    whole = Prune(layers=list(range(len(setup.teacher.arch.layers)))).run(setup.teacher, ctx)
    assert len(seen) == 1
    assert all(torch.equal(values, state(setup.teacher)[name]) for name, values in state(whole).items())


def test_students_with_other_operators_are_scored_by_activation(setup, ctx):
    layers = tuple(replace(layer, shares=i == 1) for i, layer in enumerate(setup.teacher.arch.layers))
    shared = cut(setup.teacher, replace(setup.teacher.arch, layers=layers), in_order(setup.teacher))
    small = Prune(neurons=16).run(shared, ctx)
    assert {layer.neurons for layer in small.arch.layers} == {16}
    assert ctx.notes["criterion"].startswith("activation")
    by_size = Prune(neurons=16, heads=2, criterion="magnitude").run(shared, ctx)
    assert {(layer.heads, layer.neurons) for layer in by_size.arch.layers} == {(2, 16)}


def test_an_ordered_student_is_sliced_and_nothing_else(setup, ctx):
    ordered = replace(setup.teacher, ordered=True)
    stage = Prune(criterion="obs", rounds=3, heads=2, neurons=16)
    small = stage.run(ordered, ctx)
    own, whole = state(small), state(ordered)
    assert not small.ordered
    for name, values in own.items():
        corner = tuple(slice(0, size) for size in values.shape)
        assert torch.equal(values, whole[name][corner]), name
    assert "rounds" not in ctx.notes
    assert ctx.notes["reconstruct"].startswith("no: the student is ordered")


def test_rounds_go_to_the_plan_in_steps_with_training_between(setup, ctx, monkeypatch):
    from edgekd.distill import recover as module

    seen = []

    def remember(settings, student, inner):
        seen.append((student.arch, settings.epochs, inner.work))
        return real(settings, student, inner)

    real = module.recover
    monkeypatch.setattr(module, "recover", remember)
    before = state(setup.teacher)
    small = Prune(rounds=3, samples=32, layers=[0, 2], heads=1, neurons=16, epochs_per_round=2).run(setup.teacher, ctx)
    plan = plan_from_settings(setup.teacher.arch, [0, 2], 1, 16)
    assert small.arch == plan
    assert [epochs for _, epochs, _ in seen] == [2, 2]
    assert len({work for _, _, work in seen}) == 2
    assert [each["shape"] for each in ctx.notes["rounds"]] == [arch.describe() for arch, _, _ in seen]
    assert all(0 <= each["accuracy"] <= 1 for each in ctx.notes["rounds"])
    assert all(torch.equal(values, before[name]) for name, values in state(setup.teacher).items())
    embeddings = "bert.embeddings.LayerNorm.weight"
    assert not torch.equal(state(small)[embeddings], before[embeddings])  # it was trained on the way


def test_rounds_are_repeatable(setup, ctx, tmp_path, one_thread):
    stage = Prune(rounds=2, samples=16, heads=1, neurons=16)
    one = state(stage.run(setup.teacher, ctx))
    two = state(stage.run(setup.teacher, replace(ctx, work=tmp_path / "again", notes={})))
    assert all(torch.equal(values, two[name]) for name, values in one.items())


@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 40])
def test_gradual_shapes_shrink_to_the_plan_and_never_below(rounds):
    layers = tuple(Layer(source=i, heads=2, neurons=32, tokens=4) for i in (0, 3, 5))
    plan = replace(ARCH, layers=layers, hidden=32)
    shapes = gradual(ARCH, plan, rounds, [0.9, 0.1, 0.5, 0.8, 0.3, 0.7])
    assert shapes[-1] == plan
    assert len(shapes) <= rounds
    assert len(set(shapes)) == len(shapes)
    final = {layer.source: layer for layer in plan.layers}
    for before, after in zip([ARCH, *shapes], shapes, strict=False):
        assert after.hidden <= before.hidden
        old = {layer.source: layer for layer in before.layers}
        assert set(final) <= {layer.source for layer in after.layers} <= set(old)
        for layer in after.layers:
            assert layer.heads <= old[layer.source].heads
            assert layer.neurons <= old[layer.source].neurons
            least = final.get(layer.source)
            assert least is None or (layer.heads >= least.heads and layer.neurons >= least.neurons)
        assert after.hidden >= plan.hidden
        assert after == plan or not any(layer.tokens for layer in after.layers)


def test_the_ramp_is_cubic_and_drops_the_least_influential_layers_first():
    plan = replace(ARCH, layers=tuple(Layer(source=i, heads=8, neurons=56) for i in (0, 5)))
    first, second, last = gradual(ARCH, plan, 3, [0.9, 0.1, 0.5, 0.8, 0.3, 0.7])
    assert first.layers[0].neurons == round(256 - (1 - (2 / 3) ** 3) * 200)
    assert second.layers[0].neurons == round(256 - (1 - (1 / 3) ** 3) * 200)
    assert [layer.source for layer in first.layers] == [0, 2, 3, 5]
    assert [layer.source for layer in second.layers] == [0, 3, 5]
    assert [layer.source for layer in last.layers] == [0, 5]


def test_stages_of_a_convolutional_net_narrow_together():
    arch = replace(ARCH, family="resnet", hidden=32, channels=(8, 16, 32))
    shapes = gradual(arch, replace(arch, hidden=16, channels=(4, 8, 16)), 3, [1.0] * 6)
    assert [shape.hidden for shape in shapes] == [shape.channels[-1] for shape in shapes]
    assert [shape.channels for shape in shapes] == [(5, 10, 21), (4, 8, 17), (4, 8, 16)]
    kept = gradual(arch, replace(arch, layers=arch.layers[:3], channels=()), 3, [1.0] * 6)
    assert all(shape.channels == arch.channels for shape in kept[:-1])


def test_a_convolutional_net_is_cut(make_model, ctx):
    task = get_task("image-classification")
    student = load_student(make_model("resnet"), auto_class=task.auto_class)
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    class Images:
        lengths = np.ones(24, np.int64)

        def __len__(self) -> int:
            return 24

        def collate(self, indices):
            return {"pixel_values": images[indices]}

    for reconstruct in (True, False):
        stage = Prune(reconstruct=reconstruct, neurons=[8, 8, 16, 8, 16])
        small = stage.run(student, replace(ctx, train=Images(), task=task, notes={}))
        assert [layer.neurons for layer in small.arch.layers] == [8, 8, 16, 8, 16]
        with torch.no_grad():
            assert torch.isfinite(small.model(pixel_values=images).logits).all()


def test_mistakes_in_settings_are_told(setup, ctx):
    with pytest.raises(RecipeError, match="unknown criterion 'obbs' .did you mean 'obs'"):
        Prune(criterion="obbs")
    for name in ("samples", "rounds", "epochs_per_round"):
        with pytest.raises(RecipeError, match=f"{name} must be at least 1, not 0"):
            Prune(**{name: 0})
    with pytest.raises(RecipeError, match="put search before it, or state layers, heads, neurons or hidden"):
        Prune().run(setup.teacher, ctx)
    for wrong, said in (
        ({"layers": [2, 1]}, "layers must be ascending"),
        ({"heads": 5}, "heads must be between 1 and 4"),
        ({"neurons": [8, 8]}, "neurons has 2 entries, but 3 layers are kept"),
        ({"hidden": 33}, "hidden must be between 1 and 32, not 33"),
        ({"hidden": 0}, "hidden must be between 1 and 32, not 0"),
    ):
        with pytest.raises(RecipeError, match=said):
            Prune(**wrong).run(setup.teacher, ctx)
    with pytest.raises(RecipeError, match="hidden is for encoders"):
        plan_from_settings(replace(ARCH, channels=(8, 64)), None, None, None, 8)
    with pytest.raises(ModelError, match="layer 0 has 4 heads"):
        Prune().run(replace(setup.teacher, plan=replace(ARCH, hidden=32, layers=ARCH.layers[:1])), ctx)


def test_the_criteria_of_the_setting_are_those_there_are():
    assert tuple(criteria.CRITERIA) == CRITERIA
    assert criteria.DEFAULT in CRITERIA


def test_importing_the_stage_does_not_import_torch():
    code = "import sys, edgekd.prune; edgekd.prune.Prune(rounds=2); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
