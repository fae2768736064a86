from __future__ import annotations

import itertools

import pytest
import torch

from edgekd.surgery.obs import Moments, factor, greedy, group_errors

GENERATOR = torch.Generator().manual_seed(0)


def rows(count: int, width: int) -> torch.Tensor:
    mixing = torch.randn(width, width, generator=GENERATOR, dtype=torch.float64)
    return torch.randn(count, width, generator=GENERATOR, dtype=torch.float64) @ mixing


def best_error(weight: torch.Tensor, x: torch.Tensor, kept: list[int]) -> float:
    """What is left of `x Wᵀ` after the best fit from the kept columns."""
    wanted = x @ weight.T
    if not kept:
        return float(wanted.square().sum())
    found = torch.linalg.lstsq(x[:, kept], wanted).solution
    return float((wanted - x[:, kept] @ found).square().sum())


@pytest.mark.parametrize("width", [1, 3])
def test_the_score_is_what_least_squares_leaves(width):
    x, weight = rows(60, 12), torch.randn(5, 12, generator=GENERATOR, dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x)
    scores = group_errors(weight, inverse, width)
    for group in range(12 // width):
        kept = [i for i in range(12) if i // width != group]
        assert float(scores[group]) == pytest.approx(best_error(weight, x, kept), rel=1e-8)


@pytest.mark.parametrize(("width", "chunk"), [(1, 1), (1, 4), (3, 1), (2, 2)])
def test_errors_of_a_greedy_pass_are_those_of_least_squares(width, chunk):
    x, weight = rows(80, 12), torch.randn(5, 12, generator=GENERATOR, dtype=torch.float64)
    found = greedy(weight, x.T @ x, width=width, chunk=chunk, damping=0.0)
    count, total = 12 // width, best_error(weight, x, [])
    assert sorted(found.order.tolist()) == list(range(count))
    for gone in range(0, count + 1, chunk):
        left = set(range(count)) - set(found.order[:gone].tolist())
        kept = [i for i in range(12) if i // width in left]
        assert float(found.errors[count - gone]) == pytest.approx(best_error(weight, x, kept) / total, abs=1e-9)


def test_every_step_removes_what_costs_least_then():
    x, weight = rows(80, 7), torch.randn(4, 7, generator=GENERATOR, dtype=torch.float64)
    order = greedy(weight, x.T @ x, damping=0.0).order.tolist()
    for gone in range(7):
        left = [i for i in range(7) if i not in order[:gone]]
        costs = {i: best_error(weight, x, [k for k in left if k != i]) for i in left}
        assert order[gone] == min(costs, key=lambda i: costs[i])


def test_the_order_is_better_than_that_of_single_scores():
    """Two copies of a strong input: one of them is free, but not both; single scores call both of them free."""
    x = rows(100, 6)
    x[:, 1] = x[:, 0] + 1e-4 * torch.randn(100, generator=GENERATOR, dtype=torch.float64)
    weight = torch.ones(3, 6, dtype=torch.float64)
    weight[:, :2] *= 30
    order = greedy(weight, x.T @ x, damping=1e-9).order.tolist()
    assert order[0] in (0, 1)
    assert order[-1] == 1 - order[0]


def test_errors_rise_from_nothing_to_all():
    x, weight = rows(50, 40), torch.randn(8, 40, generator=GENERATOR, dtype=torch.float64)
    errors = greedy(weight, x.T @ x, chunk=8).errors
    assert float(errors[-1]) == 0
    assert float(errors[0]) == pytest.approx(1, abs=1e-6)
    assert bool((errors[1:] <= errors[:-1]).all())


def test_inputs_that_are_always_zero_cost_nothing():
    x = rows(50, 6)
    x[:, [1, 4]] = 0
    found = greedy(torch.ones(2, 6, dtype=torch.float64), x.T @ x, damping=0.0)
    assert set(found.order[:2].tolist()) == {1, 4}
    assert float(found.errors[4]) < 1e-6
    nothing = greedy(torch.ones(2, 3), torch.zeros(3, 3))
    assert bool(torch.isfinite(nothing.errors).all())


def test_moments_are_those_of_all_rows():
    x, y = rows(40, 5) + 3, rows(40, 2) - 1
    sums = Moments()
    for part in (slice(0, 7), slice(7, 40)):
        sums.add(x[part].float(), y[part].float())
    about = x - x.mean(0)
    assert torch.allclose(sums.gram(centred=True), about.T @ about, rtol=1e-4)
    assert torch.allclose(sums.gram(centred=False), x.T @ x, rtol=1e-4)
    assert torch.allclose(sums.cross(centred=True), about.T @ (y - y.mean(0)), rtol=1e-3, atol=1e-3)


def test_a_row_of_weight_two_counts_as_two_rows():
    x, y, weights = rows(9, 4), rows(9, 2), torch.tensor([1.0, 2, 1, 1, 3, 1, 1, 1, 2])
    one, two = Moments(), Moments()
    one.add(x, y, weights)
    again = torch.repeat_interleave(torch.arange(9), weights.long())
    two.add(x[again], y[again])
    for centred in (True, False):
        assert torch.allclose(one.gram(centred=centred), two.gram(centred=centred))
        assert torch.allclose(one.cross(centred=centred), two.cross(centred=centred))


def test_damping_is_raised_until_there_is_a_factor():
    matrix, lower = factor(torch.ones(4, 4, dtype=torch.float64), 0.0)
    assert torch.allclose(lower @ lower.T, matrix)
    assert float((matrix - torch.ones(4, 4)).abs().max()) < 1e-6


def test_small_sets_are_found_as_by_trying_all():
    """Greedy is not optimal, but on nearly independent inputs it is."""
    x = torch.randn(500, 6, generator=GENERATOR, dtype=torch.float64)
    weight = torch.diag(torch.tensor([5.0, 1.0, 4.0, 2.0, 6.0, 3.0], dtype=torch.float64))
    order = greedy(weight, x.T @ x, damping=0.0).order.tolist()
    for kept in range(1, 6):
        best = min(itertools.combinations(range(6), kept), key=lambda each: best_error(weight, x, list(each)))
        assert set(order[6 - kept :]) == set(best)
