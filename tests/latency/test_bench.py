from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekd import host
from edgekd.errors import ModelError, TargetError
from edgekd.latency import bench
from edgekd.latency.bench import Settings, Subject, measure, trace_operators
from edgekd.target import Target, load_target

QUICK = Settings(blocks=4, block_ms=0.1, min_runs=12, max_seconds=5.0, window_ms=1.0, warmup_seconds=0.2)


@pytest.fixture
def local() -> Target:
    return load_target("local")


def test_models_measured_together_share_their_blocks(text_model: Path, static_model: Path, local: Target) -> None:
    subjects = [Subject(name="text", path=text_model), Subject(name="static", path=static_model)]
    text, static = measure(subjects, target=local, sequence=16, threads=1, settings=QUICK)
    assert (text.name, static.name) == ("text", "static")
    assert set(text.block) == set(static.block) == set(range(4))
    for samples in (text, static):
        assert len(samples.ms) == len(samples.block) >= 12
        assert (samples.ms > 0).all()
        assert (samples.batch, samples.sequence, samples.threads, len(samples.cpus)) == (1, 16, 1, 1)
        assert samples.load_ms is not None
        assert samples.peak_rss_mb is None


def test_memory_is_measured_in_a_process_of_its_own(text_model: Path, local: Target) -> None:
    settings = Settings(**{**vars(QUICK), "memory": True})
    (samples,) = measure([Subject(name="text", path=text_model)], target=local, threads=1, settings=settings)
    assert samples.peak_rss_mb is not None
    # A process that merely imports the runtime; this one, with its test libraries, is not counted.
    assert 10 < samples.peak_rss_mb < 400


def test_given_feeds_are_used(text_model: Path, local: Target, tmp_path: Path) -> None:
    ids = np.ones((2, 7), np.int64)
    np.savez(tmp_path / "feeds.npz", input_ids=ids, attention_mask=ids)
    subject = Subject(name="text", path=text_model, feeds=tmp_path / "feeds.npz")
    (samples,) = measure([subject], target=local, threads=1, settings=QUICK)
    assert (samples.batch, samples.sequence) == (2, 7)


def test_session_options_reach_the_runtime(text_model: Path, local: Target) -> None:
    level = {"graph_optimization": "disabled", "disabled_optimizers": ["SkipLayerNormFusion"], "config": {"a.b": "1"}}
    measure([Subject(name="text", path=text_model, options=level)], target=local, threads=1, settings=QUICK)


def test_the_time_limit_ends_the_rounds_early(text_model: Path, local: Target) -> None:
    settings = Settings(**{**vars(QUICK), "blocks": 1000, "max_seconds": 0.0})
    (samples,) = measure([Subject(name="text", path=text_model)], target=local, threads=1, settings=settings)
    assert set(samples.block) == {0, 1}


def test_the_parents_environment_does_not_reach_the_worker(
    text_model: Path, local: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    monkeypatch.setenv("LD_PRELOAD", "/nowhere.so")
    (samples,) = measure([Subject(name="text", path=text_model)], target=local, threads=1, settings=QUICK)
    assert len(samples.ms) >= 12


def test_inputs_that_do_not_fit_are_the_users_error(text_model: Path, local: Target, tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", input_ids=np.ones((1, 4), np.float32))
    subject = Subject(name="text", path=text_model, feeds=tmp_path / "feeds.npz")
    with pytest.raises(ModelError, match=r"cannot run .*model\.onnx on input_ids \[1, 4\]"):
        measure([subject], target=local, threads=1, settings=QUICK)
    (tmp_path / "feeds.npz").write_bytes(b"no archive")
    with pytest.raises(ModelError, match="cannot read the inputs"):
        measure([subject], target=local, threads=1, settings=QUICK)


def test_a_model_that_does_not_load_is_named(text_model: Path, local: Target) -> None:
    import onnx

    model = onnx.load(str(text_model))
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, str(text_model))
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load .*model\.onnx: .*NoSuchOperator"):
        measure([Subject(name="text", path=text_model)], target=local, threads=1, settings=QUICK)


def test_missing_files_and_too_many_threads_are_refused(text_model: Path, local: Target, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model file"):
        measure([Subject(name="none", path=tmp_path / "none.onnx")], target=local, settings=QUICK)
    with pytest.raises(TargetError, match=r"4096 threads asked, but this process may use \d+ CPUs"):
        measure([Subject(name="text", path=text_model)], target=local, threads=4096, settings=QUICK)


def test_an_unavailable_target_is_never_measured(text_model: Path, local: Target) -> None:
    gpu = Target(**{**vars(local), "name": "gpu", "providers": ("NoSuchExecutionProvider",)})
    with pytest.raises(TargetError, match="target 'gpu' is unavailable: ONNX Runtime has no NoSuchExecutionProvider"):
        measure([Subject(name="text", path=text_model)], target=gpu, settings=QUICK)


def test_every_operator_of_the_graph_is_traced(text_model: Path, local: Target) -> None:
    options = {"graph_optimization": "disabled"}
    rows = trace_operators(Subject(name="text", path=text_model, options=options), target=local, threads=1, runs=5)
    assert {row.type: row.calls for row in rows} == dict.fromkeys(
        ("Gather", "Cast", "Unsqueeze", "Mul", "ReduceMean"), 1
    )
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert {row.provider for row in rows} == {"CPUExecutionProvider"}


def test_cpus_are_distinct_cores_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "physical_cores", lambda: (0, 2))
    monkeypatch.setattr(host, "logical_cpus", lambda: (0, 1, 2, 3))
    assert bench.choose_cpus(2) == (0, 2)
    assert bench.choose_cpus(3) == (0, 1, 2)


def test_the_worker_needs_neither_edgekd_nor_torch(text_model: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.argv = ['worker', '-']; exec(compile(open({str(bench.WORKER)!r}).read(), 'w', 'exec'))"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['edgekd'] = sys.modules['torch'] = None\n" + code],
        input=json.dumps(_request(text_model, tmp_path)), text=True, capture_output=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["subjects"][0]["name"] == "text"


def test_the_worker_stops_when_nobody_waits_for_it(text_model: Path, tmp_path: Path) -> None:
    request = {**_request(text_model, tmp_path), "parent": os.getppid()}
    subprocess.run([sys.executable, str(bench.WORKER)], input=json.dumps(request), text=True, check=False)
    assert "is gone" in json.loads((tmp_path / "result.json").read_text())["error"]


def _request(model: Path, folder: Path) -> dict[str, object]:
    np.savez(folder / "feeds.npz", input_ids=np.ones((1, 4), np.int64), attention_mask=np.ones((1, 4), np.int64))
    session = {
        "providers": ["CPUExecutionProvider"], "threads": 1, "graph_optimization": "all", "disabled_optimizers": [],
        "config": {},
    }  # fmt: skip
    subject = {"name": "text", "path": str(model), "feeds": str(folder / "feeds.npz"), "session": session}
    files = {"samples": str(folder / "samples.npz"), "result": str(folder / "result.json")}
    return {"job": "time", "subjects": [subject], "cpus": [], "parent": 0, **vars(QUICK), **files}
