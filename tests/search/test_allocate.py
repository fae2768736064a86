from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekd.arch import Arch, Layer
from edgekd.search import allocate as module
from edgekd.search.allocate import additive, allocate
from edgekd.search.space import Steps
from edgekd.surgery.curves import Curves

STEPS = Steps(1, 32)


def full(depth: int = 3, heads: int = 3, neurons: int = 128) -> Arch:
    layers = tuple(Layer(source=i, heads=heads, neurons=neurons) for i in range(depth))
    return Arch(family="bert", hidden=32, head_dim=8, vocabulary=50, layers=layers)


def curves_of(arch: Arch, seed: int = 0, fixed: tuple[int, ...] = ()) -> Curves:
    """Random falling errors."""
    generator = np.random.default_rng(seed)

    def falling(count: int) -> torch.Tensor:
        return torch.from_numpy(np.append(np.sort(generator.random(count))[::-1].copy(), 0.0))

    heads = tuple(falling(layer.heads) for layer in arch.layers)
    neurons = tuple(falling(layer.neurons) for layer in arch.layers)
    weights = generator.random((3, len(arch.layers)))
    drops = tuple(float("inf") if i in fixed else float(d) for i, d in enumerate(1.5 * weights[2]))
    none = tuple(torch.zeros(0) for _ in arch.layers)
    return Curves(heads, neurons, drops, tuple(weights[0]), tuple(weights[1]), none, none, none, none)


def predictor(seed: int, correction: float = 0.0):
    """Additive milliseconds, with a concave attention and inner cost, and a factor that depends on the depth."""
    base, fixed, per_head, per_neuron = np.random.default_rng(seed).random(4)

    def predict(arch: Arch) -> float:
        layers = [fixed + per_head * each.heads**0.9 + per_neuron * each.neurons**0.8 / 16 for each in arch.layers]
        return float((base + sum(layers)) * (1 + correction * (len(arch.layers) - 2)))

    return predict


def error_of(curves: Curves, arch: Arch) -> float:
    kept = {layer.source: layer for layer in arch.layers}
    return sum(
        curves.error(i, kept[i].heads, kept[i].neurons) if i in kept else drop for i, drop in enumerate(curves.drops)
    )


def all_shapes(arch: Arch, kept: tuple[int, ...] | None):
    widths = [
        [
            *(replace(layer, heads=h, neurons=n) for h in (1, 2, 3) for n in (32, 64, 96, 128)),
            *([None] * (kept is None)),
        ]
        for i, layer in enumerate(arch.layers)
        if kept is None or i in kept
    ]
    for chosen in itertools.product(*widths):
        layers = tuple(layer for layer in chosen if layer is not None)
        if layers:
            yield replace(arch, layers=layers)


@pytest.mark.parametrize("kept", [None, (0, 1, 2), (0, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_trying_all(seed, kept):
    arch = full()
    curves, predict = curves_of(arch, seed), predictor(seed)
    shapes = [(predict(shape), error_of(curves, shape)) for shape in all_shapes(arch, kept)]
    times = sorted(ms for ms, _ in shapes)
    for share in (0.0, 0.02, 0.2, 0.5, 0.9, 1.0):
        limit = times[int(share * (len(times) - 1))] + 1e-9
        found = allocate(arch, curves, predict, limit, STEPS, kept=kept)
        best = min(error for ms, error in shapes if ms <= limit)
        assert found is not None
        assert predict(found) <= limit
        assert error_of(curves, found) == pytest.approx(best, abs=1e-12)
        if kept is not None:
            assert tuple(layer.source for layer in found.layers) == kept


@pytest.mark.parametrize("correction", [-0.15, 0.15])
def test_the_limit_holds_where_costs_do_not_add_up(correction):
    arch = full(depth=4)
    for seed in range(4):
        curves, predict = curves_of(arch, seed), predictor(seed, correction)
        shapes = [(predict(shape), error_of(curves, shape)) for shape in all_shapes(full(depth=4), (0, 1, 2, 3))]
        limit = sorted(ms for ms, _ in shapes)[len(shapes) // 4]
        found = allocate(arch, curves, predict, limit, STEPS)
        assert found is not None
        assert predict(found) <= limit
        best = min(error for ms, error in shapes if ms <= limit)
        assert error_of(curves, found) <= best * 1.1


def test_nothing_fits_an_impossible_limit():
    arch = full()
    curves, predict = curves_of(arch), predictor(0)
    smallest = min(predict(shape) for shape in all_shapes(arch, None))
    assert allocate(arch, curves, predict, 0.99 * smallest, STEPS) is None
    assert allocate(arch, curves, predict, 1.01 * smallest, STEPS) is not None


def test_the_full_shape_is_kept_where_it_fits():
    arch = full()
    assert allocate(arch, curves_of(arch), predictor(0), 1e6, STEPS) == arch


def test_layers_that_may_not_go_stay():
    arch = full(depth=5)
    curves, predict = curves_of(arch, 1, fixed=(1, 3)), predictor(3)
    found = allocate(arch, curves, predict, 0.35 * predict(arch), STEPS)
    assert found is not None
    assert {1, 3} <= {layer.source for layer in found.layers}


def test_convolutional_layers_have_no_heads():
    arch = full(heads=0)
    curves, predict = curves_of(arch), predictor(2)
    found = allocate(arch, curves, predict, 0.6 * predict(arch), STEPS)
    assert found is not None
    assert all(layer.heads == 0 for layer in found.layers)
    assert predict(found) <= 0.6 * predict(arch)


def test_given_costs_are_used_as_they_are():
    arch = full()
    curves, predict = curves_of(arch), predictor(1)
    asked = []

    def counted(shape: Arch) -> float:
        asked.append(shape)
        return predict(shape)

    costs = additive(arch, predict, STEPS)
    limit = 0.5 * predict(arch)
    assert allocate(arch, curves, counted, limit, STEPS, costs=costs) == allocate(arch, curves, predict, limit, STEPS)
    assert 0 < len(asked) < 30
    layer = replace(arch.layers[1], heads=1, neurons=64)
    small = replace(arch, layers=(arch.layers[0], layer, arch.layers[2]))
    added = costs.base + sum(costs.fixed) + costs.heads[1][1] + costs.neurons[1][64]
    assert added == pytest.approx(predict(small))


def test_few_bins_lose_little(monkeypatch):
    arch = full(depth=6, neurons=512)
    curves, predict = curves_of(arch, 5), predictor(5)
    limit = 0.4 * predict(arch)
    exact = allocate(arch, curves, predict, limit, STEPS)
    monkeypatch.setattr(module, "FRONT", 300)
    coarse = allocate(arch, curves, predict, limit, STEPS)
    assert exact is not None
    assert coarse is not None
    assert predict(coarse) <= limit
    assert error_of(curves, exact) <= error_of(curves, coarse) + 1e-12
    assert error_of(curves, coarse) <= 1.02 * error_of(curves, exact)


def test_widths_are_multiples_of_the_steps_or_the_full_ones():
    arch = full(heads=12, neurons=200)
    curves, predict = curves_of(arch, 2), predictor(2)
    for share in (0.3, 0.6, 0.9):
        found = allocate(arch, curves, predict, share * predict(arch), Steps(4, 64))
        assert found is not None
        assert {layer.heads for layer in found.layers} <= {4, 8, 12}
        assert {layer.neurons for layer in found.layers} <= {64, 128, 192, 200}
