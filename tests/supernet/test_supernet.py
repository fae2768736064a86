"""Laws of the supernet: sorting changes nothing, sub-networks are cuts, and training makes them better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.arch import Arch
from edgekd.context import Budget, Context, Silent
from edgekd.data import Examples
from edgekd.distill.losses import LOSSES
from edgekd.distill.teachers import fingerprint
from edgekd.errors import RecipeError
from edgekd.student import Student, load_student
from edgekd.supernet import Supernet
from edgekd.supernet.rewire import rewire
from edgekd.supernet.sandwich import space_of
from edgekd.supernet.slices import Slices, draw
from edgekd.supernet.space import Space, evenly, kept_layers
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.importance import in_order
from edgekd.surgery.sample import sample_batches
from edgekd.target import Target
from edgekd.tasks import get_task

KINDS = ("bert", "roberta", "electra", "distilbert", "vit", "deit", "resnet", "resnet-bottleneck")
TEXT = ("bert", "roberta", "electra", "distilbert")
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "fp32", "examples": 16}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def context(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Context]:
    """A function that gives a context with a random teacher of a kind and examples that it can read."""

    def make(kind: str) -> Context:
        task = get_task("text-classification" if kind in TEXT else "image-classification")
        processor = task.load_processor(make_model(kind))
        generator = np.random.default_rng(0)

        def examples(count: int) -> Examples:
            labels = np.arange(count) % 2
            if kind not in TEXT:
                return Examples({"image": generator.integers(0, 256, (count, 8, 8), dtype=np.uint8)}, labels)
            words = [[f"word{i}" for i in generator.integers(0, 40, generator.integers(2, 9))] for _ in labels]
            return Examples({"text": [" ".join([("bad", "good")[i % 2], *w]) for i, w in enumerate(words)]}, labels)

        return Context(
            teacher=load_student(make_model(kind), auto_class=task.auto_class),
            task=task,
            processor=processor,
            train=task.encode(processor, examples(48), None),
            validation=task.encode(processor, examples(24), None),
            test=None,
            target=Target(name="here", title="here", runtime="onnxruntime", device="cpu", precisions=("fp32",)),
            budget=Budget(),
            work=tmp_path / "work",
            cache=tmp_path / "cache",
            progress=Silent(),
            seed=3,
        )

    return make


def _ordered(ctx: Context) -> Student:
    return rewire(ctx.teacher, measure_importance(ctx.teacher, sample_batches(ctx.train, 16, seed=ctx.seed)))


def _outputs(model: Any, ctx: Context) -> torch.Tensor:
    """Logits and last hidden states on a batch, in one vector."""
    with torch.no_grad():
        out = model(**ctx.train.collate(np.arange(12)), output_hidden_states=True)
    return torch.cat([out.logits.flatten(), out.hidden_states[-1].flatten()])


def _shapes(space: Space, count: int = 4) -> list[Arch]:
    torch.manual_seed(1)
    return [space.largest(), space.smallest(), space.middle(), *(space.shape(draw) for _ in range(count))]


@pytest.mark.parametrize("kind", KINDS)
def test_sorting_leaves_the_outputs(context: Any, kind: str) -> None:
    ctx = context(kind)
    before = fingerprint(ctx.teacher.model)
    ordered = _ordered(ctx)
    assert ordered.ordered
    assert ordered.arch == ctx.teacher.arch
    assert fingerprint(ordered.model) != before == fingerprint(ctx.teacher.model)
    assert torch.allclose(_outputs(ordered.model, ctx), _outputs(ctx.teacher.model, ctx), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "vit", "resnet"])
def test_the_most_important_parts_come_first(context: Any, kind: str) -> None:
    ctx = context(kind)
    examples = sample_batches(ctx.train, 16, seed=ctx.seed)
    scores = measure_importance(replace(_ordered(ctx), ordered=False), examples)
    before = measure_importance(ctx.teacher, examples)
    for parts in ("heads", "neurons"):
        for now, then in zip(getattr(scores, parts), getattr(before, parts), strict=True):
            assert torch.allclose(now, then.sort(descending=True).values, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sub_network_is_what_cut_makes(context: Any, kind: str) -> None:
    ctx = context(kind)
    ordered = _ordered(ctx)
    space = space_of(Supernet(layers=1), ordered)
    slices = Slices(ordered)
    shapes = _shapes(space)
    assert len({shape.describe() for shape in shapes}) >= 5
    for shape in shapes:
        network = slices(shape)
        apart = cut(ordered, shape, in_order(ordered))
        assert apart.arch == shape == network.arch
        assert torch.allclose(_outputs(network.model, ctx), _outputs(apart.model, ctx), atol=1e-5)
    assert not torch.allclose(_outputs(slices(shapes[1]).model, ctx), _outputs(ordered.model, ctx), atol=1e-2)


def test_sub_networks_follow_the_shared_weights(context: Any) -> None:
    ctx = context("bert")
    ordered = _ordered(ctx)
    slices, shape = Slices(ordered), space_of(Supernet(), ordered).middle()
    before = _outputs(slices(shape).model, ctx)
    with torch.no_grad():
        for parameter in ordered.model.parameters():
            parameter.mul_(1.1)
    after = _outputs(slices(shape).model, ctx)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after, _outputs(cut(ordered, shape, in_order(ordered)).model, ctx), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_gradients_reach_the_prefix_alone(context: Any, kind: str) -> None:
    ctx = context(kind)
    ordered = _ordered(ctx)
    shape = space_of(Supernet(neurons=0.5, heads=0.5, layers=3 if kind == "resnet" else 2), ordered).smallest()
    Slices(ordered)(shape).model(**ctx.train.collate(np.arange(12))).logits.square().sum().backward()
    layers = ordered.family.layers(ordered.model)
    kept = {layer.source for layer in shape.layers}
    for index, module in enumerate(layers):
        grads = [parameter.grad for parameter in module.parameters()]
        assert all((grad is None) == (index not in kept) for grad in grads)
    last = layers[-1]
    width = shape.layers[-1].neurons
    columns = ordered.family.neuron_input(last).weight.grad
    assert columns[:, :width].abs().sum() > 0 == columns[:, width:].abs().sum()
    if kind == "bert":
        features = shape.layers[-1].heads * ordered.arch.head_dim
        value = ordered.family.qkv(last)[2].weight.grad
        assert value[:features].abs().sum() > 0 == value[features:].abs().sum()
    apart = cut(ordered, shape, in_order(ordered))
    apart.model(**ctx.train.collate(np.arange(12))).logits.square().sum().backward()
    own = ordered.family.neuron_input(apart.family.layers(apart.model)[-1]).weight.grad
    assert torch.allclose(own, columns[:, :width], atol=1e-5)


LEARN = Supernet(epochs=1, batch_size=16, learning_rate=2e-3, schedule="constant", precision="fp32", examples=16)


def _longer(ctx: Context) -> Context:
    """Each training example eight times, so that one epoch, after which nothing is chosen, is enough."""
    return replace(ctx, train=ctx.train.take(np.tile(np.arange(48), 8)))


def _distance(student: Student, ctx: Context, shape: Arch) -> float:
    """How far a sub-network's last hidden states are from the teacher's, on the training examples."""
    batch = ctx.train.collate(np.arange(48))
    network = cut(student, shape, in_order(student)).model
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states[-1] for model in (network, ctx.teacher.model)]
    return float(
        LOSSES["hidden_mse"].function(*([state.movedim(1, -1)] if state.dim() == 4 else [state] for state in states))
    )


@pytest.mark.parametrize("kind", ["bert", "vit", "resnet"])
def test_training_brings_all_sub_networks_nearer_to_the_teacher(context: Any, kind: str) -> None:
    ctx = _longer(context(kind))
    before, trained = _ordered(ctx), LEARN.run(ctx.teacher, ctx)
    space = space_of(LEARN, trained)
    for shape in (space.smallest(), space.middle()):
        assert _distance(trained, ctx, shape) < 0.8 * _distance(before, ctx, shape)
    assert trained.ordered
    assert trained.arch == ctx.teacher.arch
    assert ctx.notes["scores"].keys() == {"largest", "middle", "smallest"}
    assert all(parameter.requires_grad for parameter in trained.model.parameters())


def test_an_ordered_student_is_saved_and_loaded(context: Any, tmp_path: Path) -> None:
    ctx = context("bert")
    trained = Supernet(**QUICK).run(ctx.teacher, ctx)
    trained.save(tmp_path / "saved")
    again = load_student(tmp_path / "saved", auto_class=ctx.task.auto_class)
    assert again.ordered
    assert again.trained == trained.trained == {"layers": 2, "heads": 0.25, "neurons": 0.125}
    assert again.arch == trained.arch
    assert torch.equal(_outputs(again.model, ctx), _outputs(trained.model, ctx))
    assert torch.equal(measure_importance(again, []).neurons[0], torch.arange(64, 0, -1, dtype=torch.float32))


def test_repeated_and_interrupted_training_give_the_same_bits(context: Any, tmp_path: Path) -> None:
    ctx = context("bert")
    settings = Supernet(**{**QUICK, "batch_size": 8, "checkpoint_steps": 1})
    prints = [fingerprint(settings.run(ctx.teacher, replace(ctx, work=tmp_path / name)).model) for name in "ab"]
    other = fingerprint(settings.run(ctx.teacher, replace(ctx, work=tmp_path / "c", seed=4)).model)

    class Stop(Silent):
        steps = 0

        def advance(self, steps: int = 1, **metrics: float) -> None:
            self.steps += 1
            if self.steps == 4:
                raise KeyboardInterrupt

    stopped = replace(ctx, work=tmp_path / "d", progress=Stop())
    with pytest.raises(KeyboardInterrupt):
        settings.run(ctx.teacher, stopped)
    resumed = replace(ctx, work=tmp_path / "d", notes={})
    prints.append(fingerprint(settings.run(ctx.teacher, resumed).model))
    assert len(set(prints)) == 1
    assert other not in prints


@pytest.mark.parametrize("losses", [{"minilm": 1}, {"rkd": 1, "cross_entropy": 1}, {"hidden_mse": 1, "squarehead": 1}])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_other_losses_train_the_same_way(context: Any, kind: str, losses: Any) -> None:
    ctx = context(kind)
    trained = Supernet(losses=losses, **QUICK).run(ctx.teacher, ctx)
    assert fingerprint(trained.model) != fingerprint(_ordered(ctx).model)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trained.model.parameters())


def test_word_embeddings_stay_unless_asked(context: Any) -> None:
    ctx = context("bert")
    tables = []
    for freeze in (None, False):
        run = replace(ctx, work=ctx.work / str(freeze))
        tables.append(Supernet(freeze_embeddings=freeze, **QUICK).run(ctx.teacher, run).model.get_input_embeddings())
    before = _ordered(ctx).model.get_input_embeddings().weight
    assert torch.equal(tables[0].weight, before)
    assert not torch.equal(tables[1].weight, before)


def test_depths_are_spread_evenly_and_end_with_the_last_layer() -> None:
    assert evenly(6, 6) == (0, 1, 2, 3, 4, 5)
    assert evenly(6, 3) == (1, 3, 5)
    assert evenly(6, 4) == (0, 2, 3, 5)
    assert evenly(12, 5) == (1, 4, 6, 9, 11)
    for layers in range(1, 25):
        for keep in range(1, layers + 1):
            found = evenly(layers, keep)
            assert len(set(found)) == keep
            assert list(found) == sorted(found)
            assert found[-1] == layers - 1
            assert found[0] >= 0
    assert kept_layers([False, True, True, False, True], 3) == (0, 3, 4)
    assert kept_layers([False, True, True, False, True], 2) == (0, 3)
    with pytest.raises(RecipeError, match="between 2 and 5 layers can be kept, not 1"):
        kept_layers([False, True, True, False, True], 1)


def test_shapes_stay_within_the_settings(context: Any) -> None:
    ctx = context("bert")
    space = space_of(Supernet(heads=0.5, neurons=0.25, layers=2), ctx.teacher)
    assert space.largest() == ctx.teacher.arch
    smallest = space.smallest()
    assert [(x.source, x.heads, x.neurons) for x in smallest.layers] == [(1 - 1, 2, 16), (2, 2, 16)]
    torch.manual_seed(0)
    drawn = [space.shape(draw) for _ in range(60)]
    layers = [layer for shape in drawn for layer in shape.layers]
    assert {len(shape.layers) for shape in drawn} == {2, 3}
    assert {layer.heads for layer in layers} == {2, 3, 4}
    assert min(x.neurons for x in layers) >= 16
    assert max(x.neurons for x in layers) <= 64
    wide = replace(space, arch=replace(space.arch, layers=(replace(space.arch.layers[0], neurons=1536),) * 3))
    assert {layer.neurons % 32 for _ in range(20) for layer in wide.shape(draw).layers} == {0}


def test_what_cannot_be_trained_is_refused(context: Any) -> None:
    ctx = context("bert")
    with pytest.raises(RecipeError, match="heads must be at most 1, not 2"):
        Supernet(heads=2)
    with pytest.raises(RecipeError, match="unknown loss 'fwd_kl'"):
        Supernet(losses={"fwd_kl": 1})
    layers = ctx.teacher.arch.layers
    changed = replace(ctx.teacher.arch, layers=(replace(layers[0], activation="relu"), *layers[1:]))
    with pytest.raises(RecipeError, match="layer 0 was changed by operators"):
        Supernet(**QUICK).run(replace(ctx.teacher, arch=changed), ctx)
    images = context("resnet")
    with pytest.raises(RecipeError, match="loss 'minilm' needs attention"):
        Supernet(losses={"minilm": 1}, **QUICK).run(images.teacher, images)
