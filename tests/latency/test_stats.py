from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edgekd.latency import stats
from edgekd.latency.stats import Samples


def samples(ms: np.ndarray, name: str = "model") -> Samples:
    """Samples from an array [blocks, runs]."""
    return Samples(name=name, ms=ms.ravel(), block=np.repeat(np.arange(len(ms)), ms.shape[1]))


def test_constant_latencies_have_a_point_as_interval() -> None:
    facts = stats.summarize(samples(np.full((120, 4), 2.0)), target="t")
    assert (facts.p50_ms, facts.p99_ms, facts.mean_ms, facts.min_ms) == (2.0, 2.0, 2.0, 2.0)
    assert facts.ci95_ms == facts.p95_ci95_ms == facts.p95_ci99_ms == (2.0, 2.0)
    assert facts.throughput == 500.0


def test_percentiles_agree_with_numpy_and_lie_in_their_intervals() -> None:
    ms = np.random.default_rng(0).lognormal(1.0, 0.2, (150, 5))
    facts = stats.summarize(samples(ms), target="t")
    for value, quantile, interval in (
        (facts.p50_ms, 0.5, facts.ci95_ms),
        (facts.p90_ms, 0.9, facts.p90_ci95_ms),
        (facts.p95_ms, 0.95, facts.p95_ci95_ms),
        (facts.p99_ms, 0.99, facts.p99_ci95_ms),
    ):
        assert value == pytest.approx(np.quantile(ms, quantile))
        assert interval is not None
        assert interval[0] <= value <= interval[1]


def test_few_samples_cannot_bound_a_tail() -> None:
    facts = stats.summarize(samples(np.random.default_rng(0).lognormal(1.0, 0.2, (20, 1))), target="t")
    assert facts.p95_ci95_ms is not None
    assert math.isinf(facts.p95_ci95_ms[1])
    assert facts.to_dict()["p95_ci95_ms"][1] is None


def test_the_object_of_the_manifest_is_valid_json() -> None:
    few = samples(np.ones((3, 1)))
    for facts in (stats.summarize(few, target="t", baseline=few), stats.unavailable("gpu", "it is not there")):
        assert json.loads(json.dumps(facts.to_dict(), allow_nan=False))["target"] == facts.target


def test_unavailable_has_a_reason_and_no_figure() -> None:
    facts = stats.unavailable("gpu", "no CUDA here", batch=2).to_dict()
    assert facts["kind"] == "unavailable"
    assert facts["reason"] == "no CUDA here"
    assert all(facts[key] is None for key in facts if key.endswith("_ms") or key in ("speedup", "throughput"))


def test_correlated_samples_count_for_less() -> None:
    rng = np.random.default_rng(0)
    independent = rng.normal(10, 1, (120, 8))
    by_block = np.repeat(rng.normal(10, 1, (120, 1)), 8, axis=1)
    widths = [np.diff(stats.summarize(samples(ms), target="t").ci95_ms or (0, 0))[0] for ms in (independent, by_block)]
    assert widths[1] > 2 * widths[0]


def test_slow_drift_lengthens_the_runs_that_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 120)
    assert stats.run_length(noise) <= 2
    assert stats.run_length(noise + 3 * np.sin(np.arange(120) / 12)) >= 10


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_intervals_cover_the_truth(quantile: float) -> None:
    truth = float(np.exp(0.1 * {0.5: 0.0, 0.95: 1.6448536}[quantile]))
    covered = 0
    for seed in range(200):
        ms = np.random.default_rng(seed).lognormal(0.0, 0.1, 480)
        low, high = stats.intervals(ms, np.repeat(np.arange(120), 4), (quantile,), level=0.95)[0]
        covered += low <= truth <= high
    assert covered >= 0.92 * 200


def test_the_ratio_is_free_of_common_drift() -> None:
    covered, widths = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        drift = np.exp(np.cumsum(rng.normal(0, 0.03, (120, 1)), axis=0))
        teacher, student = (samples(scale * drift * rng.lognormal(0, 0.05, (120, 4))) for scale in (8.0, 2.0))
        low, high = stats.ratio_interval(teacher, student, level=0.95, seed=seed)
        covered += low <= 4.0 <= high
        widths.append(high / low - 1)
    assert covered >= 0.9 * 60
    assert np.median(widths) < 0.1


def test_weighted_medians_of_equal_weights_are_the_median() -> None:
    ms = np.random.default_rng(0).normal(10, 1, 10_000)
    index = np.repeat(np.arange(100), 100)
    assert stats.weighted_medians(ms, index, np.ones((3, 100))) == pytest.approx([np.median(ms)] * 3, rel=1e-3)


def test_medians_of_blocks_of_any_size() -> None:
    ms, index = np.array([3.0, 1.0, 2.0, 5.0, 7.0]), np.array([0, 0, 0, 1, 1])
    assert stats.medians(ms, index, 2).tolist() == [2.0, 6.0]


def test_joined_looks_keep_all_samples_and_separate_blocks() -> None:
    joined = stats.join([samples(np.ones((3, 2))), samples(np.full((4, 1), 2.0))])
    assert joined.ms.tolist() == [1.0] * 6 + [2.0] * 4
    assert joined.block.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
