from __future__ import annotations

import ast
import json
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd import host
from edgekd.devices import ort, remote
from edgekd.errors import ModelError, TargetError
from edgekd.latency import bench
from edgekd.latency.bench import Settings, Subject, measure, trace_operators
from edgekd.latency.stats import Samples, join
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
    with pytest.raises(ModelError, match="cannot read the inputs .*: it is no .npz file"):
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


def test_given_cpus_are_kept_to(text_model: Path, local: Target) -> None:
    cpu = host.logical_cpus()[0]
    subjects = [Subject(name="text", path=text_model)]
    (samples,) = measure(subjects, target=local, cpus=[cpu], settings=QUICK)
    assert (samples.cpus, samples.threads) == ((cpu,), 1)
    pinned = Target(**{**vars(local), "cpus": (cpu,)})
    (samples,) = measure(subjects, target=pinned, settings=QUICK)
    assert samples.cpus == (cpu,)
    with pytest.raises(TargetError, match=rf"2 threads asked, but only CPUs \[{cpu}\] to run on"):
        measure(subjects, target=pinned, threads=2, settings=QUICK)
    with pytest.raises(TargetError, match=r"CPUs \[4095\] are not among those that may be used"):
        measure(subjects, target=local, cpus=[4095], settings=QUICK)


def test_facts_of_the_machine_come_with_the_samples(text_model: Path, local: Target) -> None:
    import onnxruntime

    (samples,) = measure([Subject(name="text", path=text_model)], target=local, threads=1, settings=QUICK)
    assert samples.facts["cpu"] == host.cpu_name()
    assert samples.facts["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert samples.facts["python"] == platform.python_version()
    assert {"governor", "load", "max_mhz", "celsius_before", "celsius_after", "mhz_before", "mhz_after"} <= set(
        samples.facts
    )


@pytest.fixture
def worker() -> dict[str, Any]:
    return runpy.run_path(str(bench.WORKER), run_name="worker")


def test_heat_and_frequency_are_read_from_the_system(worker: dict[str, Any], tmp_path: Path) -> None:
    conditions = worker["_conditions"]
    assert "celsius" in conditions([0])
    conditions.__globals__["SYSTEM"] = tmp_path
    assert conditions([2, 3]) == {"celsius": None, "mhz": None}
    for zone, degrees in enumerate(("41000", "-274000", "67500", "nonsense")):
        (tmp_path / f"class/thermal/thermal_zone{zone}").mkdir(parents=True)
        (tmp_path / f"class/thermal/thermal_zone{zone}/temp").write_text(degrees + "\n")
    for cpu, kilohertz in ((0, 600_000), (2, 2_400_000), (3, 1_800_000)):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{kilohertz}\n")
        (folder / "cpuinfo_max_freq").write_text("2400000\n")
        (folder / "scaling_governor").write_text("ondemand\n")
    assert conditions([2, 3]) == {"celsius": 67.5, "mhz": 1800.0}
    machine = worker["_machine"]([2, 3])
    assert (machine["governor"], machine["max_mhz"]) == ("ondemand", 2400.0)


def test_the_worker_takes_the_last_cpus_if_none_are_named(text_model: Path, tmp_path: Path) -> None:
    request = {**_request(text_model, tmp_path), "cpus": None}
    subprocess.run([sys.executable, str(bench.WORKER)], input=json.dumps(request), text=True, check=True)
    assert json.loads((tmp_path / "result.json").read_text())["cpus"] == list(host.logical_cpus()[-1:])
    request["subjects"][0]["session"]["threads"] = 4096
    subprocess.run([sys.executable, str(bench.WORKER)], input=json.dumps(request), text=True, check=False)
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["of"] == "target"
    assert told["error"].startswith("4096 threads asked, but only")


def test_options_reach_each_provider(text_model: Path, local: Target, tmp_path: Path) -> None:
    arena = Target(**{**vars(local), "options": {"provider_options": {"CPUExecutionProvider": {"no_such": "1"}}}})
    request = _request(text_model, tmp_path)
    request["subjects"][0]["session"]["providers"] = ort.prepare(arena, threads=1, options={})["providers"]
    assert request["subjects"][0]["session"]["providers"] == [["CPUExecutionProvider", {"no_such": "1"}]]
    asked = tmp_path / "asked.json"
    code = (
        "import json, onnxruntime as o, runpy; start = o.InferenceSession\n"
        "def session(*args, providers, **more):\n"
        f"    json.dump(providers, open({str(asked)!r}, 'w')); return start(*args, providers=providers, **more)\n"
        "o.InferenceSession = session\n"
        f"runpy.run_path({str(bench.WORKER)!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(request), text=True, check=True)
    assert json.loads(asked.read_text()) == [["CPUExecutionProvider", {"no_such": "1"}]]
    stray = Target(**{**vars(local), "options": {"provider_options": {"CUDAExecutionProvider": {"device_id": "0"}}}})
    with pytest.raises(TargetError, match="provider_options for CUDAExecutionProvider, not among its providers"):
        ort.prepare(stray, threads=1, options={})


def test_a_provider_that_was_not_taken_is_an_error(text_model: Path, tmp_path: Path) -> None:
    request = _request(text_model, tmp_path)
    request["subjects"][0]["session"]["providers"] = [["CPUExecutionProvider", {}], ["AbsentExecutionProvider", {}]]
    code = (
        "import onnxruntime as o, runpy; start = o.InferenceSession\n"
        "o.InferenceSession = lambda *a, providers, **m: start(*a, providers=providers[:1], **m)\n"
        f"runpy.run_path({str(bench.WORKER)!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(request), text=True, check=False)
    assert "could not use AbsentExecutionProvider" in json.loads((tmp_path / "result.json").read_text())["error"]


@pytest.mark.parametrize("file", [bench.WORKER, bench.WORKER.with_name("worker_engines.py"), remote.RUNNER])
def test_what_runs_on_boards_is_python_3_8_and_stands_alone(file: Path) -> None:
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "numpy", "onnxruntime", "openvino"}


def test_facts_from_several_looks_are_the_first_and_the_last() -> None:
    looks = [
        Samples(name="m", ms=np.ones(2), block=np.arange(2), facts={"celsius_before": heat, "celsius_after": heat + 1})
        for heat in (40, 50)
    ]
    assert join(looks).facts == {"celsius_before": 40, "celsius_after": 51}


def test_cpus_are_distinct_cores_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "physical_cores", lambda: (0, 2))
    monkeypatch.setattr(host, "logical_cpus", lambda: (0, 1, 2, 3))
    assert bench.choose_cpus(2) == (0, 2)
    assert bench.choose_cpus(3) == (0, 1, 2)


def test_the_worker_needs_neither_edgekd_nor_torch(text_model: Path, tmp_path: Path) -> None:
    code = f"import runpy; sys.argv = ['worker', '-']; runpy.run_path({str(bench.WORKER)!r}, run_name='__main__')"
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


def _request(model: Path, folder: Path) -> dict[str, Any]:
    np.savez(folder / "feeds.npz", input_ids=np.ones((1, 4), np.int64), attention_mask=np.ones((1, 4), np.int64))
    session = {
        "providers": [["CPUExecutionProvider", {}]], "threads": 1, "graph_optimization": "all",
        "disabled_optimizers": [], "config": {},
    }  # fmt: skip
    subject = {"name": "text", "path": str(model), "feeds": str(folder / "feeds.npz"), "session": session}
    files = {"samples": str(folder / "samples.npz"), "result": str(folder / "result.json")}
    return {"job": "time", "subjects": [subject], "cpus": [], "parent": 0, **vars(QUICK), **files}
