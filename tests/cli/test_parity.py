"""`edgekd parity`: sound files pass, changed ones do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from edgekd.cli import main
from edgekd.export.bundle import seal
from edgekd.export.layers import quantized_layers
from edgekd.export.lower import lower
from edgekd.export.matmul_nbits import linears_by_module
from edgekd.export.onnx import export_float
from edgekd.store import RunFolder
from edgekd.student import load_student

KEY = "bert.encoder.layer.0.attention.self.key"


@pytest.fixture(scope="module")
def files(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and its dynamic int8 file."""
    folder, out = make_model("bert"), tmp_path_factory.mktemp("parity")
    student = load_student(folder, auto_class="AutoModelForSequenceClassification")
    graph = export_float(student, "text-classification", out / "float.onnx")
    return folder, lower(graph, out / "int8.onnx", "int8_dynamic")


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_a_sound_file_passes_and_its_layers_are_counted(files: tuple[Path, Path], text_data: Path) -> None:
    done = invoke("parity", *files, "--data", text_data, "--count", 12)
    assert done.exit_code == 0, done.output
    assert "of 12 predictions agree (test)" in done.stdout
    assert "20 weights and 0 activation scales compared\n" in done.stdout
    assert "no tensor leaves tolerance (10 dB)" in done.stdout
    told = json.loads(invoke("parity", *files, "--data", text_data, "--count", 12, "--json", "-q").stdout)
    assert told["ok"] is True
    assert set(told["metric"]) == {"name", "torch", "artifact"}
    assert told["scales"]["mismatches"] == []
    assert told["blame"]["first"] is None


@pytest.mark.parametrize("form", ["int4_weights", "int8_weights"])
def test_packed_weights_are_compared_too(make_model: Any, text_data: Path, tmp_path: Path, form: str) -> None:
    folder = make_model("bert")
    student = load_student(folder, auto_class="AutoModelForSequenceClassification")
    graph = export_float(student, "text-classification", tmp_path / "float.onnx")
    file = lower(graph, tmp_path / "packed.onnx", form)
    done = invoke("parity", folder, file, "--data", text_data, "--count", 12, "--json", "-q")
    told = json.loads(done.stdout)["scales"]
    assert told["mismatches"] == []
    assert KEY in told["weights"]
    assert told["absent"] == []
    changed = onnx.load(file)
    scales = linears_by_module(changed)[KEY].input[2]
    [tensor] = [tensor for tensor in changed.graph.initializer if tensor.name == scales]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), scales))
    onnx.save(changed, tmp_path / "changed.onnx")
    done = invoke("parity", folder, tmp_path / "changed.onnx", "--data", text_data, "--count", 12)
    assert done.exit_code != 0
    assert f"{KEY}: packed weights" in done.stdout


def test_a_changed_weight_fails_and_is_named(files: tuple[Path, Path], text_data: Path, tmp_path: Path) -> None:
    graph = onnx.load(files[1])
    [layer] = [layer for layer in quantized_layers(graph) if layer.module == KEY]
    for tensor in graph.graph.initializer:
        value = np.array(numpy_helper.to_array(tensor))
        if np.array_equal(value, layer.integers.T):
            value[0, 0] ^= 1
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(graph, tmp_path / "changed.onnx")
    done = invoke("parity", files[0], tmp_path / "changed.onnx", "--data", text_data, "--count", 4)
    assert done.exit_code == 4
    assert f"1 differ: {KEY}: weight integers, 1 of 1024" in done.stdout


@pytest.fixture
def run(files: tuple[Path, Path], tmp_path: Path) -> Path:
    """A finished run: a search, a last student of two rounds, and the bundle of the first."""
    folder = RunFolder(tmp_path / "run")
    ledger = []
    for index, name in ((1, "search"), (2, "quantize"), (2, "quantize-round2")):
        stage = folder.stage(index, name, name)
        folder.begin(stage)
        draft = folder.draft(stage)
        if name == "quantize":
            shutil.copytree(files[0], draft, dirs_exist_ok=True)
        ledger.append({"stage": name, "seconds": 0.1 + index})
        folder.commit(stage, draft, ledger[-1])
    bundle = folder.path / "bundle"
    bundle.mkdir()
    shutil.copyfile(files[1], bundle / "model.onnx")
    seal(bundle, {"artifact": {"file": "model.onnx"}, "ledger": ledger[:2]}, "")
    folder.finish({"bundles": {"local": "bundle"}})
    return folder.path


def test_a_run_stands_for_its_last_student_and_its_bundle(run: Path, text_data: Path) -> None:
    done = invoke("parity", run, "--data", text_data, "--count", 4)
    assert done.exit_code == 0, done.output
    assert "of 4 predictions agree (test)" in done.stdout
    shutil.rmtree(run / "02-quantize")
    done = invoke("parity", run, "--data", text_data)
    assert done.exit_code == 2
    assert "is not in" in done.stderr


def test_a_run_that_cannot_be_compared_says_what_is_missing(run: Path, text_data: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "bundle", run / "bundle-b")
    for bundles, message in (
        ({}, "has no bundle"),
        ({"a": "bundle", "b": "bundle-b"}, f"edgekd parity {run / '02-quantize'} {run / 'bundle-b'}"),
        ({"a": "gone"}, "gone is not a bundle"),
        (None, "is not finished: manifest.json is missing or damaged; there is 01-search, 02-quantize"),
    ):
        (run / "manifest.json").write_text(json.dumps({"bundles": bundles}))
        done = invoke("parity", run, "--data", text_data)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
    done = invoke("parity", tmp_path, "--data", text_data)
    assert "is not a run of `edgekd compress`: give a run, or both STUDENT and ARTIFACT" in done.stderr


def test_what_is_no_artifact_is_refused(files: tuple[Path, Path], text_data: Path) -> None:
    done = invoke("parity", files[0], files[0], "--data", text_data)
    assert done.exit_code == 2
    assert "is neither an .onnx or .tflite file nor a bundle" in done.stderr
    assert "give --data" in invoke("parity", *files).stderr
