from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.arch import Arch, Layer
from edgekd.calibrate.shapes import chains, short_chains
from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec
from edgekd.devices import Estimate, usual_threads
from edgekd.errors import BudgetError, RecipeError, TargetError
from edgekd.latency.stats import Samples
from edgekd.latency.table import Conditions, LatencyTable, Point, frame_of
from edgekd.pipeline.setup import prepare
from edgekd.search import Search, reference, strategy
from edgekd.search.space import Steps, depth_chain, importance_widths, uniform_widths, with_layers
from edgekd.surgery import Importance
from edgekd.target import load_target

ARCH = Arch(
    family="bert",
    hidden=64,
    head_dim=8,
    vocabulary=100,
    layers=tuple(Layer(source=i, heads=8, neurons=256) for i in range(6)),
)


def cost(arch: Arch) -> float:
    """An additive latency in milliseconds."""
    return 0.2 + sum(0.1 + 0.05 * layer.heads + 0.002 * layer.neurons for layer in arch.layers)


def scores(seed: int = 0) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    heads = tuple(torch.rand(8, generator=generator) for _ in range(6))
    return Importance(heads, tuple(torch.rand(256, generator=generator) for _ in range(6)), torch.ones(6))


@pytest.mark.parametrize("limit", [0.7, 1.5, 3.0, 5.0])
@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5), (0, 2, 5), (3,)])
def test_widths_are_within_the_limit_and_not_wasteful(kept, limit):
    steps = Steps(1, 32)
    smallest = cost(
        with_layers(replace(ARCH, layers=tuple(Layer(source=i, heads=1, neurons=32) for i in range(6))), kept)
    )
    for shape in (
        uniform_widths(ARCH, kept, limit, cost, steps),
        importance_widths(ARCH, kept, limit, cost, steps, scores()),
    ):
        if shape is None:
            assert smallest > limit * 0.8
            continue
        assert cost(shape) <= limit
        assert [layer.source for layer in shape.layers] == list(kept)
        assert all(1 <= layer.heads <= 8 and 32 <= layer.neurons <= 256 for layer in shape.layers)
        full = cost(with_layers(ARCH, kept))
        assert shape == with_layers(ARCH, kept) or cost(shape) > min(limit, full) * 0.75


def test_a_limit_below_everything_gives_none():
    assert uniform_widths(ARCH, (0,), 0.01, cost, Steps(1, 32)) is None
    assert importance_widths(ARCH, (0,), 0.01, cost, Steps(1, 32), scores()) is None


def test_unimportant_layers_are_cut_first():
    importance = scores()
    flat = torch.ones(256)
    peaked = torch.full((256,), 1e-3)
    peaked[:32] = 1
    neurons = (peaked, flat, flat, flat, flat, flat)
    shape = importance_widths(
        ARCH, range(6), cost(ARCH) - 0.4, cost, Steps(1, 32), replace_neurons(importance, neurons)
    )
    assert shape is not None
    assert shape.layers[0].neurons < min(layer.neurons for layer in shape.layers[1:])


def replace_neurons(importance: Importance, neurons: tuple[torch.Tensor, ...]) -> Importance:
    return Importance(importance.heads, neurons, importance.layers)


def test_depth_chain_drops_the_least_harmful_layer_each_time():
    harm = {0: 5.0, 1: 0.1, 2: 3.0, 3: 0.2, 4: 2.0, 5: 9.0}

    def divergence(arch: Arch) -> float:
        return sum(harm.values()) - sum(harm[layer.source] for layer in arch.layers)

    chain = depth_chain(ARCH, [True] * 6, divergence, fewest=2)
    assert chain == [(0, 1, 2, 3, 4, 5), (0, 2, 3, 4, 5), (0, 2, 4, 5), (0, 2, 5), (0, 5)]
    assert depth_chain(ARCH, [True, False, True, False, True, True], divergence, fewest=4)[-1] == (0, 1, 3, 5)


def test_points_tell_all_parts_apart():
    shapes = short_chains(ARCH)
    assert len(set(shapes)) == len(shapes) >= 9
    assert len({len(shape.layers) for shape in shapes}) >= 2
    assert len({shape.layers[0].heads for shape in shapes}) >= 3
    assert len({shape.layers[0].neurons for shape in shapes}) >= 3


@pytest.fixture
def context(make_model, text_data, tmp_path) -> Context:
    setup = prepare(make_model("bert"), DataSpec(path=str(text_data)), progress=Silent())
    return Context(
        teacher=setup.teacher,
        task=setup.task,
        processor=setup.processor,
        train=setup.train,
        validation=setup.validation,
        test=None,
        target=load_target("local"),
        budget=Budget(speedup=2.0, sequence=16),
        work=tmp_path,
        cache=tmp_path / "cache",
        progress=Silent(),
        teacher_graph=Path("teacher.onnx"),
    )


class Clock:
    """Stands in for building and measuring: a known cost with an error the search must correct."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bias: float = 1.0) -> None:
        self.bias, self.teacher_ms, self.shapes = bias, 10.0, {}
        for module in (strategy, reference):
            monkeypatch.setattr(module, "build_graph", self.build)
        monkeypatch.setattr(reference, "measure", self.measure)

    def build(self, body, arch, frame, ctx, output):
        output.touch()
        self.shapes[output] = arch
        return output

    def cost(self, arch: Arch) -> float:
        return 1.0 + sum(0.5 + 0.3 * layer.heads + 0.0203 * layer.neurons for layer in arch.layers)

    def measure(self, subjects, **settings):
        def ms(subject):
            if subject.name == "teacher":
                return self.teacher_ms
            bias = self.bias if subject.name == "student" else 1.0
            return self.cost(self.shapes[subject.path]) * bias

        return [
            Samples(name=s.name, ms=np.full(120, ms(s)), block=np.arange(120), sequence=16, threads=1) for s in subjects
        ]


@pytest.mark.parametrize("bias", [1.0, 1.15, 0.85])
def test_the_measured_latency_of_the_choice_is_just_under_the_budget(context, monkeypatch, bias):
    clock = Clock(monkeypatch, bias)
    student = Search(samples=16, neuron_step=4).run(context.teacher, context)
    assert student.model is context.teacher.model
    speedup = clock.teacher_ms / (clock.cost(student.plan) * bias)
    assert 2.0 <= speedup < 2.0 / 0.85
    assert context.notes["checks"]


def test_p95_budgets_are_searched_the_same_way(context, monkeypatch):
    clock = Clock(monkeypatch)
    ctx = replace(context, budget=Budget(latency_p95_ms=4.0, sequence=16))
    plan = Search(samples=16, neuron_step=4).run(ctx.teacher, ctx).plan
    assert 0.85 * 4.0 < clock.cost(plan) <= 4.0


def test_a_stricter_round_chooses_a_smaller_shape(context, monkeypatch):
    clock = Clock(monkeypatch)
    loose = Search(samples=16, neuron_step=4).run(context.teacher, context).plan
    strict = Search(samples=16, neuron_step=4).run(context.teacher, replace(context, strictness=0.8)).plan
    assert clock.cost(strict) < 0.9 * clock.cost(loose)


def test_an_impossible_budget_names_the_nearest_point(context, monkeypatch):
    Clock(monkeypatch)
    ctx = replace(context, budget=Budget(speedup=500.0, sequence=16))
    with pytest.raises(BudgetError, match=r"speedup of 500 .* out of reach on local: the nearest point is [0-9.]+×"):
        Search(samples=16).run(ctx.teacher, ctx)
    ctx = replace(context, budget=Budget(latency_p95_ms=0.01, sequence=16))
    with pytest.raises(BudgetError, match=r"p95 of 0.01 ms .* the nearest point is [0-9.]+ ms"):
        Search(samples=16).run(ctx.teacher, ctx)


def test_the_latency_table_is_measured_once_and_read_again(context, monkeypatch):
    clock = Clock(monkeypatch)
    Search(samples=16, checks=0).run(context.teacher, context)
    built = len(clock.shapes)
    again = replace(context, notes={})
    Search(samples=16, checks=0).run(again.teacher, again)
    assert len(clock.shapes) == built
    with pytest.raises(RecipeError, match="there is no latency table at 'nowhere.json'"):
        Search(table="nowhere.json").run(context.teacher, context)
    next(context.cache.glob("latency-*.json")).write_text("{}")
    with pytest.raises(RecipeError, match="is not what search wrote there"):
        Search(samples=16).run(context.teacher, context)


def saved_table(context, clock, path, **conditions):
    arch = context.teacher.arch
    frame = frame_of(arch, "fp32", 1, 16)
    shapes = [*short_chains(arch), *chains(arch)]
    points = [
        Point(frame=frame, ms=clock.cost(shape), layers=tuple((x.source, x.heads, x.neurons) for x in shape.layers))
        for shape in shapes
    ]
    own = {"threads": usual_threads(context.target), **conditions}
    table = LatencyTable(conditions=Conditions(target="local", **own), points=tuple(points)).refit()
    table.save(path)
    return table


def test_a_table_made_before_is_used_and_brought_to_the_speed_of_now(context, monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    saved_table(context, clock, tmp_path / "table.json")
    monkeypatch.setattr(clock, "cost", lambda arch, cost=clock.cost: 1.5 * cost(arch))
    plan = Search(samples=16, neuron_step=4, table=str(tmp_path / "table.json")).run(context.teacher, context).plan
    assert context.notes["table"] == "table.json"
    assert 2.0 <= clock.teacher_ms / clock.cost(plan) < 2.0 / 0.85
    assert len([path for path in clock.shapes if path.stem.startswith("p")]) == 3


def test_a_table_of_other_conditions_is_refused_by_name_and_passed_over_otherwise(context, monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    path = tmp_path / "table.json"
    for conditions, message in (({"threads": 7}, "made with 7 threads"), ({"cpu": "Other"}, "made on Other")):
        saved_table(context, clock, path, **conditions)
        with pytest.raises(RecipeError, match=message):
            Search(samples=16, table=str(path)).run(context.teacher, context)
    monkeypatch.setattr(reference, "find_table", lambda name: path)
    Search(samples=16, checks=0).run(context.teacher, context)
    assert context.notes["table"] == "measured for this search"


def test_an_unavailable_target_needs_a_table(context, monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    for module in (strategy, reference):
        monkeypatch.setattr(module, "unavailable", lambda target: "it is not here")
    with pytest.raises(TargetError, match=r"local is unavailable: it is not here\. Give a table"):
        Search(samples=16).run(context.teacher, context)
    saved_table(context, clock, tmp_path / "table.json")
    plan = Search(samples=16, neuron_step=4, table=str(tmp_path / "table.json")).run(context.teacher, context).plan
    assert clock.cost(context.teacher.arch) / clock.cost(plan) >= 2.0 * 0.99
    assert context.notes["table"] == "table.json, nothing was run"


def test_a_compiled_target_is_searched_by_estimates(context, monkeypatch):
    clock = Clock(monkeypatch)

    class Fake:
        def __init__(self, target, work): ...
        def __enter__(self):
            return self

        def __exit__(self, *problem): ...
        def __call__(self, body, arch, frame):
            return Estimate(ms=clock.cost(arch))

    for module in (strategy, reference):
        monkeypatch.setattr(module, "Estimator", Fake)
        monkeypatch.setattr(module, "is_estimated", lambda target: True)
    plan = Search(samples=16, neuron_step=4).run(context.teacher, context).plan
    assert 2.0 <= clock.cost(context.teacher.arch) / clock.cost(plan) < 2.0 / 0.85


def test_without_a_latency_budget_the_full_shape_is_kept(context):
    ctx = replace(context, budget=Budget(size_mb=1))
    assert Search().run(ctx.teacher, ctx).plan == ctx.teacher.arch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"margin": 0.7}, "margin must be"),
        ({"checks": -1}, "checks must"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        Search(**settings)


def test_a_fitted_table_predicts_additive_costs(context, monkeypatch):
    clock = Clock(monkeypatch)
    Search(samples=16, checks=0).run(context.teacher, context)
    predict = reference.read_reference(next(context.cache.glob("latency-*.json"))).predictor()
    shape = replace(context.teacher.arch, layers=context.teacher.arch.layers[:2])
    assert predict(shape) == pytest.approx(clock.cost(shape), rel=0.05)
