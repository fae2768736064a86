from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import ModelError
from edgekd.latency import bench, stats
from edgekd.latency.artifact import Artifact
from edgekd.latency.bench import Settings, Subject
from edgekd.latency.stats import Samples
from edgekd.latency.sweep import TRIAL, mean_interval, rate, sweep
from edgekd.latency.workload import Workload
from edgekd.target import load_target

QUICK = Settings(blocks=12, block_ms=0.05, min_runs=24, max_seconds=5.0, window_ms=1.0, warmup_seconds=0.1)


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    (tmp_path / "inputs").mkdir()
    return Workload(target=load_target("local"), folder=tmp_path / "inputs", threads=1)


def test_batches_are_measured_in_one_run(text_model: Path, workload: Workload) -> None:
    points = sweep(workload, Artifact(text_model), "batch", [4, 1, 4], settings=QUICK)
    assert [point.size for point in points] == [4, 1]
    for point in points:
        assert point.measurement is not None
        assert point.samples is not None
        assert point.measurement.batch == point.samples.batch == point.size
        assert point.measurement.sequence == 64
        assert point.throughput_ci95 is not None
        low, high = point.throughput_ci95
        assert low <= (point.measurement.throughput or 0) <= high
        assert point.to_dict("batch")["throughput_ci95"] is not None
    blocks = [point.samples.block for point in points if point.samples]
    assert set(blocks[0]) == set(blocks[1])


def test_sequences_too(text_model: Path, workload: Workload) -> None:
    points = sweep(workload, Artifact(text_model), "sequence", [8, 32], settings=QUICK)
    assert [point.measurement and point.measurement.sequence for point in points] == [8, 32]


def test_sizes_that_a_graph_does_not_take_say_why(static_model: Path, image_model: Path, workload: Workload) -> None:
    one, two = sweep(workload, Artifact(static_model), "batch", [1, 2], settings=QUICK)
    assert one.measurement is not None
    assert two.measurement is None
    assert "fixed batch of 1, not 2" in two.to_dict("batch")["reason"]
    image = Workload(**{**vars(workload), "shapes": {"pixel_values": (1, 3, 4, 4)}})
    (none,) = sweep(image, Artifact(image_model), "sequence", [16], settings=QUICK)
    assert none.reason == "the model has no sequence dimension"
    # A given shape keeps its image size and takes the batch.
    (four,) = sweep(image, Artifact(image_model), "batch", [4], settings=QUICK)
    assert four.measurement is not None
    assert four.measurement.batch == 4


def refusing(fits: Any, asked: list[tuple[list[str], Settings]]) -> Any:
    """A stand-in for the measuring process that runs only the sizes that fit."""

    def measure(models: Sequence[Subject], *, settings: Settings, **_: object) -> list[Samples]:
        asked.append(([model.name for model in models], settings))
        if not fits(models):
            raise ModelError("ONNX Runtime crashed (SIGKILL)")
        return [Samples(name=model.name, ms=np.ones(24), block=np.arange(24)) for model in models]

    return measure


def test_one_size_out_of_memory_leaves_the_others(
    text_model: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], Settings]] = []
    monkeypatch.setattr(bench, "measure", refusing(lambda models: "batch 64" not in [m.name for m in models], asked))
    small, large = sweep(workload, Artifact(text_model), "batch", [1, 64], settings=QUICK)
    assert small.measurement is not None
    assert large.reason == "ONNX Runtime crashed (SIGKILL)"
    assert [names for names, _ in asked] == [["batch 1", "batch 64"], ["batch 1"], ["batch 64"], ["batch 1"]]
    assert [settings for _, settings in asked] == [QUICK, TRIAL, TRIAL, QUICK]


def test_sizes_that_only_run_alone_say_so(
    text_model: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", refusing(lambda models: len(models) == 1, []))
    points = sweep(workload, Artifact(text_model), "batch", [1, 2], settings=QUICK)
    assert all("one by one, but not together" in point.reason for point in points)


def test_a_value_fills_an_input_and_names_are_checked(text_model: Path, workload: Workload) -> None:
    filled = Workload(**{**vars(workload), "values": {"input_ids": 7.0}, "batch": 2})
    fed = filled.feed("model", Artifact(text_model))
    assert (fed.batch, fed.sequence) == (2, 64)
    assert fed.subject.feeds is not None
    with np.load(fed.subject.feeds) as arrays:
        assert set(arrays["input_ids"].ravel()) == {7}
        assert set(arrays["attention_mask"].ravel()) == {1}
    wrong = Workload(**{**vars(workload), "shapes": {"input_id": (1, 2)}})
    with pytest.raises(ModelError, match=r"--shape: unknown input 'input_id' \(did you mean 'input_ids'"):
        wrong.check([Artifact(text_model)])


def test_session_options_go_over_those_of_the_model(text_model: Path, workload: Workload) -> None:
    shipped = Artifact(text_model, {"graph_optimization": "all", "config": {"a.b": "1", "a.c": "1"}})
    asked = Workload(**{**vars(workload), "session": {"graph_optimization": "basic", "config": {"a.b": "2"}}})
    assert asked.feed("model", shipped).subject.options == {
        "graph_optimization": "basic",
        "config": {"a.b": "2", "a.c": "1"},
    }


def test_the_interval_of_the_mean_covers_it_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ms = rng.exponential(1.0, 240) * np.repeat(rng.lognormal(0, 0.1, 60), 4)
        samples = Samples(name="m", ms=ms, block=np.repeat(np.arange(60), 4))
        low, high = mean_interval(samples, seed=seed)
        covered += low <= np.exp(0.1**2 / 2) <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_the_rate_is_slowest_where_the_mean_is_longest() -> None:
    assert rate(8, (2.0, 4.0)) == (2000.0, 4000.0)
    assert stats.REPORTED == 0.95
