from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd.sparsify.allocate import ALLOCATIONS, allocate
from edgekd.sparsify.calibration import grams, norms
from edgekd.sparsify.masks import choose
from edgekd.sparsify.matrices import as_matrix, flat, unflat
from edgekd.sparsify.oneshot import METHODS, output_error
from edgekd.sparsify.patterns import PATTERNS

GENERATOR = torch.Generator().manual_seed(0)


def inputs(count: int, width: int) -> torch.Tensor:
    """Correlated inputs of unequal size, as activations are."""
    directions = torch.linspace(0, -4, width).exp()[:, None] * torch.randn(width, width, generator=GENERATOR)
    sizes = (0.5 * torch.randn(width, generator=GENERATOR)).exp()
    return (torch.randn(count, width, generator=GENERATOR) @ directions) * sizes


def matrix(rows: int = 64, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs(600, columns).double()
    return torch.randn(rows, columns, generator=GENERATOR), x.T @ x


def whole(weight: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(weight, dtype=torch.bool)


def require_pattern(mask: torch.Tensor, name: str) -> None:
    pattern = PATTERNS[name]
    rows, columns = mask.shape
    if pattern.is_grouped:
        assert bool((mask.view(rows, -1, pattern.group).sum(-1) == pattern.kept).all())
    blocks = mask.view(rows // pattern.rows, pattern.rows, columns // pattern.columns, pattern.columns)
    sums = blocks.sum((1, 3))
    assert set(sums.unique().tolist()) <= {0, pattern.rows * pattern.columns}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_where_the_pattern_says_and_as_many(method, name):
    weight, gram = matrix()
    before, pattern = weight.clone(), PATTERNS[name]
    density = 1 - pattern.sparsity
    cut = METHODS[method](weight, gram, pattern, density, whole(weight))
    require_pattern(cut.mask, name)
    # Of six blocks of 32 x 32, a quarter cannot be kept.
    assert float(cut.mask.double().mean()) == pytest.approx(density, abs=0.1 if name == "32x32" else 1e-9)
    assert torch.equal(cut.weight != 0, cut.mask)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["unstructured", "2:4", "1:4", "4x1"])
def test_sparsegpt_leaves_less_error_than_the_others(name):
    weight, gram = matrix()
    pattern = PATTERNS[name]
    errors = {
        method: output_error(weight, cut(weight, gram, pattern, 1 - pattern.sparsity, whole(weight)).weight, gram)
        for method, cut in METHODS.items()
    }
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]
    assert errors["sparsegpt"] < 0.8 * errors["magnitude"]


def test_wanda_is_better_than_magnitude_where_inputs_are_unequal():
    weight, gram = matrix()
    errors = [
        output_error(weight, METHODS[name](weight, gram, PATTERNS["2:4"], 0.5, whole(weight)).weight, gram)
        for name in ("wanda", "magnitude")
    ]
    assert errors[0] < errors[1]


def test_sparsegpt_with_equal_independent_inputs_is_magnitude():
    weight = torch.randn(8, 16, generator=GENERATOR)
    gram = torch.eye(16, dtype=torch.float64)
    obs, plain = (
        METHODS[name](weight, gram, PATTERNS["2:4"], 0.5, whole(weight)) for name in ("sparsegpt", "magnitude")
    )
    assert torch.equal(obs.mask, plain.mask)
    assert torch.allclose(obs.weight, plain.weight)


def test_one_weight_removed_is_made_up_for_as_by_least_squares():
    """The last two inputs: of these, what goes is made up for by the other one exactly."""
    x = inputs(200, 2).double()
    weight = torch.tensor([[0.1, 3.0]])
    cut = METHODS["sparsegpt"](weight, x.T @ x, PATTERNS["unstructured"], 0.5, whole(weight))
    assert cut.mask.tolist() == [[False, True]]
    best = torch.linalg.lstsq(x[:, 1:], x @ weight.double().T).solution
    assert float(cut.weight[0, 1]) == pytest.approx(float(best), rel=0.02)  # damped


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["unstructured", "2:4", "4x1"])
def test_what_is_gone_stays_gone_when_more_goes(method, name):
    weight, gram = matrix(32, 64)
    pattern, allowed = PATTERNS[name], whole(torch.empty(32, 64))
    for share in (0.3, 0.6, 1.0):
        cut = METHODS[method](weight, gram, pattern, 1 - share * pattern.sparsity, allowed)
        assert not bool((cut.mask & ~allowed).any())
        assert bool((cut.weight[~allowed] == 0).all())
        weight, allowed = cut.weight, cut.mask
    require_pattern(allowed, name)
    assert float(allowed.double().mean()) == pytest.approx(1 - pattern.sparsity)


def test_steps_of_a_group_are_whole_weights():
    scores = torch.randn(4, 16, generator=GENERATOR)
    kept = [int(choose(scores, PATTERNS["2:4"], density)[0, :4].sum()) for density in (1.0, 0.8, 0.75, 0.6, 0.5, 0.1)]
    assert kept == [4, 4, 3, 3, 2, 2]


def test_dead_inputs_do_no_harm():
    weight, gram = matrix(16, 32)
    gram[5], gram[:, 5] = 0, 0
    for name in METHODS:
        assert bool(torch.isfinite(METHODS[name](weight, gram, PATTERNS["2:4"], 0.5, whole(weight)).weight).all())
    cut = METHODS["sparsegpt"](weight, torch.zeros_like(gram), PATTERNS["2:4"], 0.5, whole(weight))
    assert bool(torch.isfinite(cut.weight).all())


class Convolved(nn.Module):
    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.convolution(input)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.a(x) * self.b(x)


def test_grams_are_of_real_tokens_and_shared_inputs_count_once_each():
    block, x = Block(), torch.randn(3, 5, 8, generator=GENERATOR)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    block.train()
    found = grams(block, {"a": block.a, "b": block.b}, [{"x": x, "attention_mask": mask}] * 2)
    rows = x[mask.bool()].double()
    assert block.training
    for gram in found.values():
        assert torch.allclose(gram, 2 * rows.T @ rows, rtol=1e-5)
    assert torch.allclose(norms(found["a"]), (2 * rows.square().sum(0)).sqrt(), rtol=1e-5)


def test_the_gram_of_a_convolution_is_in_the_order_of_its_matrix():
    convolution = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False)
    model = Convolved(convolution)
    x = torch.randn(2, 3, 6, 6, generator=GENERATOR)
    gram = grams(model, {"c": convolution}, [{"input": x}])["c"]
    weight = as_matrix(convolution).double()
    assert float(((weight @ gram) * weight).sum()) == pytest.approx(
        float(convolution(x).detach().double().square().sum()), rel=1e-5
    )
    assert torch.equal(unflat(flat(convolution.weight), convolution.weight), convolution.weight)
    assert torch.equal(flat(convolution.weight)[1, :3], convolution.weight[1, :, 0, 0])


def modules() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    found = {
        name: nn.Linear(*shape, bias=False) for name, shape in {"a": (32, 16), "b": (16, 8), "c": (32, 64)}.items()
    }
    with torch.no_grad():
        found["b"].weight *= 100
        found["c"].weight[0] *= 40
    return found


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocations_keep_the_share_of_the_whole(name):
    found = modules()
    scales = {key: torch.ones(module.in_features) for key, module in found.items()}
    densities = allocate(name, found, PATTERNS["unstructured"], 0.25, [["a", "b"], ["c"]], scales)
    sizes = {key: module.weight.numel() for key, module in found.items()}
    kept = sum(densities[key] * size for key, size in sizes.items())
    assert kept == pytest.approx(0.25 * sum(sizes.values()), abs=1)
    assert all(0 < density < 1 for density in densities.values())
    if name == "owl":
        assert densities["c"] < densities["a"] == densities["b"] <= 0.25 + 0.0801
    if name == "global":
        assert len(set(densities.values())) == 3


def test_an_n_m_pattern_leaves_nothing_to_allocate():
    assert set(allocate("global", modules(), PATTERNS["2:4"], 0.5, [["a", "b", "c"]], {}).values()) == {0.5}
