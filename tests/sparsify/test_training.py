"""Laws of masks in the training loop."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from edgekd.distill import loop
from edgekd.distill.optimizer import step_with_decay
from edgekd.errors import StageError
from edgekd.sparsify import Sparsify, train
from edgekd.sparsify.masked import Masks
from edgekd.sparsify.matrices import weight_parameter
from edgekd.sparsify.patterns import PATTERNS
from edgekd.sparsify.plan import make_plan
from edgekd.sparsify.schedule import Ramp
from edgekd.surgery.sample import sample_batches

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "calibration": 16, "precision": "fp32", "pattern": "2:4"}
KINDS = ("fixed", "gradual", "adaptive")


def state(student: Any) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in student.model.state_dict().values()]


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[tuple[train.Course, int]]:
    """Checks masks after every step; the steps it has seen."""
    seen: list[tuple[train.Course, int]] = []
    after = train.Course.after_step

    def look(course: train.Course) -> None:
        after(course)
        seen.append((course, len(seen)))
        for _, parameter, mask in course.masks:
            if not mask.adapts:
                assert bool((parameter[~mask.kept] == 0).all())
                assert mask.kept.all() or bool((parameter[mask.kept] != 0).all())

    monkeypatch.setattr(train.Course, "after_step", look)
    return seen


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("fixed", "unstructured"), ("gradual", "2:4"), ("adaptive", "2:4"), ("adaptive", "unstructured")],
)
def test_hidden_weights_are_zero_after_every_step(setup, ctx, looked_at, kind, pattern):
    before = state(setup.teacher)
    made = Sparsify(**{**SETTINGS, "pattern": pattern}, masks=kind).run(setup.teacher, ctx)
    assert len(looked_at) == 12
    share = PATTERNS[pattern].sparsity
    shares = {
        name: zeros / made.model.get_submodule(name).weight.numel() for name, zeros in made.sparsity["layers"].items()
    }
    assert len(shares) == 18
    assert set(shares.values()) == {share}
    assert not any(parametrize.is_parametrized(module) for module in made.model.modules())
    assert state(setup.teacher) == before
    for name in shares:
        weight = made.model.get_submodule(name).weight
        assert not bool(torch.signbit(weight[weight == 0]).any()), "-0.0 would not compress"
        if pattern == "2:4":
            assert bool(((weight != 0).view(len(weight), -1, 4).sum(-1) == 2).all())
    assert ctx.notes["sparsity"]["sparsity"] == share


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_zeros_follows_the_schedule(setup, ctx, monkeypatch, kind):
    zeros = []
    after = train.Course.after_step
    monkeypatch.setattr(train.Course, "after_step", lambda course: (after(course), zeros.append(course.masks.sparsity)))
    settings = Sparsify(**{**SETTINGS, "pattern": "unstructured"}, masks=kind, mask_steps=1, ramp=(0.25, 0.75))
    settings.run(setup.teacher, ctx)
    if kind == "gradual":
        ramp = Ramp(start=0.25, end=0.75, every=1)
        assert zeros == pytest.approx([0.75 * ramp.share(step, 12) for step in range(12)], abs=1e-3)
    else:
        assert set(zeros) == {0.75}


class Kill(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize(("kind", "at"), [("fixed", 5), ("gradual", 6), ("adaptive", 10)])
def test_a_killed_run_goes_on_to_the_same_bits(setup, make_ctx, tmp_path, monkeypatch, kind, at):
    settings = {**SETTINGS, "masks": kind, "checkpoint_steps": 2, "mask_steps": 2, "evaluate_steps": 5, "ema": 0.5}
    whole = Sparsify(**settings).run(setup.teacher, make_ctx(work=tmp_path / "whole"))
    after, left = train.Course.after_step, [at]

    def kill(course: train.Course) -> None:
        after(course)
        left[0] -= 1
        if not left[0]:
            raise Kill

    monkeypatch.setattr(train.Course, "after_step", kill)
    with pytest.raises(Kill):
        Sparsify(**settings).run(setup.teacher, make_ctx(work=tmp_path / "killed"))
    ctx = make_ctx(work=tmp_path / "killed")
    resumed = Sparsify(**settings).run(setup.teacher, ctx)
    assert left[0] >= at - 12 - 2, "it went on where it was"
    assert state(resumed) == state(whole)
    assert resumed.sparsity == whole.sparsity


@pytest.mark.parametrize("kind", ["gradual", "adaptive"])
def test_only_settled_weights_may_win(setup, ctx, monkeypatch, kind):
    """The metric falls: without masks that ship, the first weights would have been the best."""
    metrics = iter([0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    evaluate = loop._evaluate

    def falling(run: Any, meter: Any) -> None:
        run.job = loop.Job(**{**vars(run.job), "evaluate": lambda: next(metrics)})
        evaluate(run, meter)

    monkeypatch.setattr(loop, "_evaluate", falling)
    Sparsify(**SETTINGS, masks=kind, evaluate_steps=3, patience=2, ramp=(0.25, 0.75)).run(setup.teacher, ctx)
    told = ctx.notes["training"]
    assert [entry["step"] for entry in told["history"]] == [3, 6, 9, 12]
    # Masks become final before step 9 (from 0), so after 9 steps they are not yet.
    assert (told["best_step"], told["metric"]) == (12, 0.7)


def masked_layer(adapts: bool) -> tuple[nn.Linear, Masks, nn.Parameter, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    masks = Masks.install({"layer": layer})
    kept = torch.arange(8).repeat(4, 1) % 2 == 0
    masks.put("layer", kept)
    masks.adapt(adapts)
    return layer, masks, weight_parameter(layer), kept


def test_gradients_of_hidden_weights_are_gone_before_anything_clips_them():
    layer, _, parameter, kept = masked_layer(False)
    layer(torch.randn(5, 8)).square().sum().backward()
    assert bool((parameter.grad[~kept] == 0).all())
    assert bool((parameter.grad[kept] != 0).all())


def test_gradients_pass_masks_that_adapt():
    layer, masks, parameter, kept = masked_layer(True)
    x = torch.randn(5, 8)
    output = layer(x)
    assert torch.allclose(output, x @ (parameter * kept).T)
    output.sum().backward()
    assert torch.allclose(parameter.grad, x.sum(0).expand(4, 8))
    masks.apply()
    assert bool((parameter[~kept] != 0).all()), "they live on"


def test_decay_pulls_hidden_weights_alone_and_towards_zero():
    _, masks, parameter, kept = masked_layer(True)
    decay = masks.decay(0.1)
    assert torch.equal(decay[parameter], 0.1 * parameter.detach() * ~kept)
    before = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
    parameter.grad = torch.zeros_like(parameter)
    step_with_decay(optimizer, decay)
    assert torch.equal(parameter[kept], before[kept])
    moved = parameter.detach()[~kept] - before[~kept]
    assert bool((moved * before[~kept] < 0).all())
    assert float(optimizer.state[parameter]["exp_avg"].abs().max()) == 0, "the decay is outside the momentum"
    masks.adapt(False)
    assert masks.decay(0.1) == {}


def test_without_decay_the_step_is_adamws_own():
    results = []
    for decayed in (False, True):
        torch.manual_seed(1)
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            step_with_decay(optimizer, {parameters[0]: torch.zeros(3, 4)} if decayed else {})
        results.append(parameters)
    for own, plain in zip(*results, strict=True):
        assert torch.allclose(own, plain, rtol=1e-5, atol=1e-7)


def test_the_decayed_step_is_that_of_the_formula():
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    mean = square = 0.0
    value = 2.0
    for step, gradient in enumerate((0.3, -0.1, 0.2), 1):
        pull = 0.5 * value
        parameter.grad = torch.tensor([gradient])
        step_with_decay(optimizer, {parameter: 0.5 * parameter.detach()})
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * (gradient + pull) ** 2
        value -= 0.1 * (mean / (1 - 0.9**step) + pull) / (math.sqrt(square / (1 - 0.95**step)) + 1e-8)
        assert float(parameter.detach()) == pytest.approx(value, rel=1e-5)


def test_a_weight_that_comes_back_to_life_is_an_error():
    _, masks, parameter, _ = masked_layer(False)
    masks.apply()
    masks.verify()
    with torch.no_grad():
        parameter[1, 1] = 1e-30
    with pytest.raises(StageError, match="came back to life in layer"):
        masks.verify()


def test_adaptive_masks_change_and_then_stand_still(setup, ctx, monkeypatch):
    masks_seen: list[bytes] = []
    after = train.Course.after_step

    def look(course: train.Course) -> None:
        after(course)
        masks_seen.append(b"".join(mask.kept.numpy().tobytes() for mask in course.masks.masks.values()))

    monkeypatch.setattr(train.Course, "after_step", look)
    settings = Sparsify(**SETTINGS, masks="adaptive", mask_steps=2, learning_rate=0.01, mask_decay=0.5)
    settings.run(setup.teacher, ctx)
    assert len(set(masks_seen[:9])) > 3
    assert len(set(masks_seen[9:])) == 1


def test_the_pull_at_hidden_weights_rises_over_a_quarter_of_the_steps(setup, ctx):
    batches = sample_batches(ctx.train, 16, seed=0)
    settings = Sparsify(**SETTINGS, masks="adaptive", mask_decay=0.5)
    student = setup.teacher.with_model(copy.deepcopy(setup.teacher.model))
    plan = make_plan(settings, student, PATTERNS["2:4"], batches)
    masks = Masks.install(plan.modules)
    course = train.Course(settings=settings, plan=plan, masks=masks)
    plan.choose(masks)
    masks.adapt(True)
    pulls = [max(float(pull.max()) for pull in course.decay(step, 40).values()) for step in range(40)]
    assert pulls[0] == 0
    assert pulls == sorted(pulls)
    assert pulls[5] == pytest.approx(pulls[10] / 2)
    assert len(set(pulls[10:])) == 1


def test_wanda_scores_of_adaptive_masks_know_the_inputs(setup, ctx):
    batches = sample_batches(ctx.train, 16, seed=0)
    by_method = {
        method: make_plan(
            Sparsify(**SETTINGS, masks="adaptive", method=method), setup.teacher, PATTERNS["2:4"], batches
        )
        for method in ("wanda", "magnitude")
    }
    assert set(by_method["wanda"].scales) == set(by_method["wanda"].modules)
    assert by_method["magnitude"].scales == {}


def test_training_makes_up_for_what_was_cut(setup, make_ctx, tmp_path: Path):
    """The mean loss of the last epoch is below that of the first, at the same sparsity."""
    ctx = make_ctx(work=tmp_path / "long")
    changed = {"epochs": 4, "learning_rate": 5e-3, "losses": {"squarehead": 1.0}, "pattern": "1:4"}
    Sparsify(**{**SETTINGS, **changed}, masks="fixed", method="magnitude").run(setup.teacher, ctx)
    losses = [entry["loss"] for entry in ctx.notes["training"]["history"]]
    assert losses[-1] < 0.9 * losses[0]


def test_nothing_is_trained_without_epochs(setup, ctx):
    made = Sparsify(**{**SETTINGS, "epochs": 0}).run(setup.teacher, ctx)
    assert "training" not in ctx.notes
    assert ctx.notes["sparsity"]["one_shot_metric"] == ctx.notes["sparsity"]["metric"]
    assert made.sparsity["density"] == 0.5
    assert not list(ctx.work.glob("*")) if ctx.work.exists() else True
