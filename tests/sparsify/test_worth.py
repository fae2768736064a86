"""What zeros are worth: in files, in flash, to the guard, and in what ships."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.context import Budget, Silent
from edgekd.export.bundle import read_manifest
from edgekd.export.sparse import compress, compressed_bytes, sparse_initializers
from edgekd.latency.bench import Settings
from edgekd.pipeline import compress as run_recipe
from edgekd.pipeline import finish, sides
from edgekd.pipeline.guard import JUDGES, Look, decide, guard
from edgekd.pipeline.sides import Scale, Side, in_flash
from edgekd.recipe import load_recipe
from edgekd.report.card import model_card
from edgekd.report.gains import gains
from edgekd.sparsify import Sparsify
from edgekd.target import load_target, probe

SHORT = Settings(blocks=8, block_ms=2, min_runs=16, warmup_seconds=0.1)


@pytest.fixture(autouse=True)
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((finish, "LOOK"), (finish, "CHOICE"), (sides, "LEDGER")):
        monkeypatch.setattr(module, name, SHORT)


def graph_of(weight: np.ndarray, path: Path) -> Path:
    """x @ weight."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    types = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n]) for name, n in (("x", 64), ("y", 32))]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(3, np.float32), "unused")]
    graph = helper.make_graph([node], "g", types[:1], types[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def matrix(zeros: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 32)).astype(np.float32)
    weight.reshape(-1)[generator.permutation(weight.size)[: round(zeros * weight.size)]] = 0
    return weight


def answers(file: Path) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize(("zeros", "smaller"), [(0.5, False), (0.6, False), (0.75, True), (0.9, True)])
def test_coordinates_load_and_say_the_same_where_they_are_smaller(tmp_path, zeros, smaller):
    file = graph_of(matrix(zeros), tmp_path / "dense.onnx")
    count = sparse_initializers(file, tmp_path / "sparse.onnx")
    assert (count == 1) == smaller
    assert ((tmp_path / "sparse.onnx").stat().st_size < file.stat().st_size) == smaller
    assert np.array_equal(answers(file), answers(tmp_path / "sparse.onnx"))


@pytest.mark.parametrize("zeros", [0.75, 0.9])
def test_deflate_is_smaller_than_coordinates(tmp_path, zeros):
    file = graph_of(matrix(zeros), tmp_path / "dense.onnx")
    sparse_initializers(file, tmp_path / "sparse.onnx")
    assert compressed_bytes(file) < (tmp_path / "sparse.onnx").stat().st_size


def test_compressed_bytes_are_those_of_deflate_and_gzip_gives_the_file_back(tmp_path):
    file = graph_of(matrix(0.75), tmp_path / "m.onnx")
    assert compressed_bytes(file) == len(zlib.compress(file.read_bytes(), 6))
    packed = compress(file, tmp_path / "m.onnx.gz")
    assert gzip.decompress(packed.read_bytes()) == file.read_bytes()
    assert 0 < packed.stat().st_size - compressed_bytes(file) < 64
    assert compress(file, tmp_path / "again.gz").read_bytes() == packed.read_bytes()


def side(ratio: float = 1.0, **known: Any) -> Side:
    latency = {"kind": "vendor_estimate", "p50_ms": 2.0 * ratio, "ratio": ratio}
    return Side(shape="s", lowering="int8_tflite", precision="int8", latency=latency, size_bytes=1_000_000, **known)


BUYS = Sparsify().buys


def test_flash_counts_where_something_is_compiled():
    before = side(flash_bytes=500_000, compressed_bytes=400_000)
    kept = decide(BUYS, before, side(flash_bytes=400_000, compressed_bytes=300_000))
    assert kept.kept
    assert "flash 0.50 → 0.40 MB (-20.0%)" in kept.why
    assert not decide(BUYS, before, side(flash_bytes=499_000, compressed_bytes=300_000)).kept
    assert decide(BUYS, before, side(flash_bytes=499_000, compressed_bytes=300_000, ratio=0.9)).kept


def test_compressed_bytes_count_where_the_device_stores_those():
    before, smaller = side(compressed_bytes=400_000), side(compressed_bytes=300_000, storage="dense")
    dropped = decide(BUYS, before, smaller)
    assert not dropped.kept
    assert dropped.why.endswith("compressed size 0.40 → 0.30 MB (-25.0%), but the device stores the plain file")
    assert decide(BUYS, before, smaller, force=True).forced
    assert decide(BUYS, before, replace(smaller, storage="compressed")).kept
    assert not decide(BUYS, before, side(compressed_bytes=399_000, storage="compressed")).kept


def test_flash_is_what_the_compiler_made(tmp_path):
    from edgekd.devices import Estimate

    (tmp_path / "a").write_bytes(b"x" * 7)
    (tmp_path / "b").write_bytes(b"x" * 5)
    files = (tmp_path / "a", tmp_path / "b")
    assert in_flash(Estimate(ms=1.0, files=files, figures={"total_npu_encoded_weights": 6.0})) == {
        "flash_bytes": 12, "encoded_bytes": 6,
    }  # fmt: skip
    assert in_flash(Estimate(ms=1.0)) == {}


def test_this_cpu_gains_nothing_from_zeros(setup, ctx, tmp_path):
    quantized = replace(setup.teacher, quantization={"lowering": "int8_dynamic"})
    stage = Sparsify(epochs=0, calibration=16, pattern="2:4")
    made = stage.run(quantized, ctx)
    target, budget = probe(load_target("local")), Budget(sequence=16, threads=1)
    scale = Scale(setup=setup, target=target, budget=budget, teacher_graph=float_graph(setup, tmp_path))
    before, after, decision = guard(scale, stage, quantized, made, tmp_path / "ledger")
    assert (before.size_bytes, before.flash_bytes) == (after.size_bytes, None)
    assert after.compressed_bytes < 0.95 * before.compressed_bytes
    assert (after.storage, before.storage) == ("dense", "")
    assert decision is not None
    assert "but the device stores the plain file" in decision.why
    as_fast = {"kind": "measured", "p50_ms": 1.0, "ratio": 1.0, "ratio_ci99": [0.99, 1.01]}
    compressed = replace(after, storage="compressed", latency=as_fast)
    assert decide(stage.buys, before, compressed).kept
    told = before.to_dict() | {"after": after.to_dict()}
    assert told["compressed_bytes"] == before.compressed_bytes
    assert "flash_bytes" not in told["after"]


def float_graph(setup: Any, folder: Path) -> Path:
    from edgekd.export.onnx import export_float

    return export_float(setup.teacher, setup.task.name, folder / "teacher.onnx")


def test_a_run_ships_the_sparse_model_and_its_compressed_file(make_model, text_data, tmp_path, monkeypatch):
    monkeypatch.setitem(JUDGES, "latency", lambda before, after: Look(gained=False, said="as fast as before"))
    stages = [
        {"quantize": {"lowering": "int8_dynamic", "force": True, "calibration": 16}},
        {"sparsify": {"pattern": "2:4", "epochs": 1, "batch_size": 8, "calibration": 16, "storage": "compressed"}},
    ]
    values = {
        "teacher": str(make_model("bert")), "data": {"path": str(text_data)},
        "budget": {"size_mb": 100, "sequence": 16, "threads": 1}, "stages": stages,
    }  # fmt: skip
    said: list[str] = []
    progress = Silent()
    progress.say = said.append  # type: ignore[method-assign]
    result = run_recipe(load_recipe("balanced", values=values), tmp_path / "run", progress=progress)
    assert any("not known to pay on target local" in line for line in said[:4]), "before anything is done"
    [manifest], [bundle] = result.manifests.values(), result.bundles.values()
    entry = manifest["ledger"][-1]
    assert (entry["stage"], entry["kept"], entry["forced"]) == ("sparsify", True, False)
    assert entry["compressed_bytes"] == entry["after"]["compressed_bytes"] < entry["before"]["compressed_bytes"]
    assert entry["details"]["sparsity"]["sparsity"] == 0.5
    artifact = manifest["artifact"]
    assert artifact["sparsity"] == {"pattern": "2:4", "zeros": artifact["sparsity"]["zeros"], "of": 24576}
    assert artifact["sparsity"]["zeros"] >= 12288
    assert artifact["compressed"] == "onnx/model.onnx.gz"
    dense = (bundle / "onnx" / "model.onnx").read_bytes()
    assert gzip.decompress((bundle / artifact["compressed"]).read_bytes()) == dense
    assert artifact["compressed_bytes"] == len(zlib.compress(dense, 6))
    assert artifact["compressed"] in read_manifest(bundle)["files"]
    onnxruntime.InferenceSession(str(bundle / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    row = gains(manifest)[-1]
    assert "compressed" in row["cells"][4]
    card = model_card(manifest)
    assert "zeros in the matrices of its layers (2:4)" in card
    assert "`onnx/model.onnx.gz` is the same file after gzip" in card
