from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgekd.cli import main
from edgekd.errors import ModelError
from edgekd.latency import bench, profile, profiling
from edgekd.latency.artifact import find_artifact
from edgekd.latency.bench import Settings, Subject
from edgekd.latency.stats import Samples
from edgekd.target import load_target

QUICK = Settings(blocks=110, block_ms=0.05, min_runs=1100, max_seconds=5.0, window_ms=1.0, warmup_seconds=0.2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "Settings", lambda **_: QUICK)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


def test_any_model_is_profiled_without_a_recipe(text_model: Path) -> None:
    result = profile(text_model.parent, threads=1, settings=QUICK)
    assert result.model == text_model
    assert result.verdict is None
    (latency,) = result.to_dict()["latency"]
    assert (latency["kind"], latency["target"], latency["batch"], latency["sequence"]) == ("measured", "local", 1, 64)
    assert latency["min_ms"] <= latency["p50_ms"] <= latency["p95_ms"] <= latency["p99_ms"]


def test_a_baseline_gives_a_ratio(text_model: Path, static_model: Path) -> None:
    result = profile(text_model, baseline=static_model, sequence=16, threads=1, settings=QUICK)
    facts = result.measurement
    assert facts.speedup == pytest.approx((facts.teacher_p50_ms or 0) / (facts.p50_ms or 1))
    assert facts.speedup_ci95 is not None
    assert facts.speedup_ci95[0] <= facts.speedup_ci95[1]


def test_an_inconclusive_verdict_is_measured_again_longer(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    asked: list[Settings] = []

    def measure(models: object, *, settings: Settings, **_: object) -> list[Samples]:
        asked.append(settings)
        ms = np.random.default_rng(len(asked)).normal(4.0, 0.5, settings.blocks)
        return [Samples(name="model", ms=ms, block=np.arange(settings.blocks))]

    monkeypatch.setattr(bench, "measure", measure)
    result = profile(text_model, latency_p95_ms=4.82, settings=Settings(memory=True))
    assert result.verdict is not None
    assert [settings.blocks for settings in asked][:3] == [120, 120, 240]
    assert [settings.memory for settings in asked][:2] == [True, False]
    assert result.measurement.n == sum(settings.blocks for settings in asked)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every inference takes 1 ms, so that the verdict does not hang on the machine."""

    def measure(models: Sequence[Subject], **settings: Any) -> list[Samples]:
        return [Samples(name=model.name, ms=np.ones(200), block=np.arange(200), threads=1) for model in models]

    monkeypatch.setattr(bench, "measure", measure)


@pytest.mark.usefixtures("steady")
def test_exit_codes_follow_the_verdict(text_model: Path) -> None:
    assert run(text_model, "--threads", "1", "-q").exit_code == 0
    assert run(text_model, "--threads", "1", "-q", "--latency-p95-ms", "10000").exit_code == 0
    missed = run(text_model, "--threads", "1", "--latency-p95-ms", "1e-6", "--json")
    assert missed.exit_code == 3
    answer = json.loads(missed.stdout)
    assert answer["verdict"][0]["status"] == "fail"
    assert "is over the budget of 1e-06 ms" in answer["verdict"][0]["reason"]


@pytest.mark.usefixtures("quick")
def test_the_table_names_every_percentile_and_operator(text_model: Path, tmp_path: Path) -> None:
    shown = run(text_model, "--threads", "1", "--per-operator", "--samples", tmp_path / "raw.csv", "-q").stdout
    for word in ("p50", "p90", "p95", "p99", "95 % interval", "load", "first inference", "examples/s", "Gather"):
        assert word in shown
    rows = list(csv.DictReader((tmp_path / "raw.csv").open()))
    assert len(rows) >= 1100
    assert {row["model"] for row in rows} == {"model"}
    assert all(float(row["ms"]) > 0 for row in rows)


def test_a_target_that_is_not_there_has_no_figure(text_model: Path, tmp_path: Path) -> None:
    shipped = load_target("local").path
    assert shipped is not None
    gpu = tmp_path / "gpu.yaml"
    gpu.write_text(shipped.read_text().replace("CPUExecutionProvider", "NoSuchExecutionProvider"))
    asked = run(text_model, "--target", gpu, "--latency-p95-ms", "5", "--json")
    assert asked.exit_code == 3
    (latency,) = json.loads(asked.stdout)["latency"]
    assert latency["kind"] == "unavailable"
    assert "NoSuchExecutionProvider" in latency["reason"]
    assert latency["p50_ms"] is None
    unasked = run(text_model, "--target", gpu)
    assert unasked.exit_code == 3
    assert "unavailable" in unasked.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx"], "there is no model none.onnx"),
        (["MODEL", "--target", "lokal"], "unknown target 'lokal' (did you mean 'local'?)"),
        (["MODEL", "--shape", "x=1,a"], "expected NAME=1,3,224,224"),
        (["MODEL", "--speedup", "2"], "--speedup needs --baseline"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_2(text_model: Path, arguments: list[str], message: str) -> None:
    result = run(*(str(text_model) if word == "MODEL" else word for word in arguments))
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_bundle_names_its_artifact_and_how_to_load_it(text_model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "onnx").mkdir(parents=True)
    needs = {"session_options": {"graph_optimization": "disabled", "later": 1}}
    manifest: dict[str, Any] = {"artifact": {"file": "onnx/small.onnx", "needs": needs}}
    (bundle / "edgekd.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"incomplete: edgekd\.json names onnx/small\.onnx, which is missing"):
        find_artifact(bundle)
    shutil.copy(text_model, bundle / "onnx" / "small.onnx")
    artifact = find_artifact(bundle)
    assert artifact.path == bundle / "onnx" / "small.onnx"
    assert artifact.options == {"graph_optimization": "disabled"}
    (bundle / "edgekd.json").write_text(json.dumps({**manifest, "files": {"onnx/small.onnx": "0" * 64}}))
    with pytest.raises(ModelError, match=r"small\.onnx is not the file that was bundled"):
        find_artifact(bundle)
    (bundle / "edgekd.json").write_text("{")
    with pytest.raises(ModelError, match=r"edgekd\.json is damaged"):
        find_artifact(bundle)


def test_folders_are_searched_in_the_usual_places(text_model: Path, image_model: Path, tmp_path: Path) -> None:
    assert find_artifact(text_model.parent).path == text_model
    assert find_artifact(image_model.parent.parent).path == image_model
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"holds no \.onnx file: it is a PyTorch model.*edgekd export"):
        find_artifact(folder)
    (folder / "a.onnx").touch()
    assert find_artifact(folder).path == folder / "a.onnx"
    (folder / "b.onnx").touch()
    with pytest.raises(ModelError, match=r"several models \(a\.onnx, b\.onnx\)"):
        find_artifact(folder)
