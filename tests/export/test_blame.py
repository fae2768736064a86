"""The layer that goes wrong is named, in whatever form its graph is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd.export.blame import blame, explain
from edgekd.export.layers import quantized_layers
from edgekd.export.lower import lower
from edgekd.export.noise import CEILING, Noise

LENGTH = 16
BROKEN = "bert.encoder.layer.1.intermediate.dense"
FORMS = {
    "int8_qdq": {"batch": 2, "sequence": LENGTH}, "int8_static": {}, "int8_dynamic": {}, "int8_dynamic_fused": {},
    "int8_dynamic_lean": {},
}  # fmt: skip


def lowered(made: Any, form: str, folder: Path, **options: Any) -> Path:
    kind = made.student.model.config.model_type
    return lower(made.graph, folder / f"{form}.onnx", form, ranges=made.ranges, model_type=kind, **options)


def broken(file: Path, module: str) -> Path:
    """The file with the integers of one layer turned around."""
    graph = onnx.load(file)
    [layer] = [layer for layer in quantized_layers(graph) if layer.module == module]
    for tensor in graph.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.int8 and any(np.array_equal(value, side) for side in (layer.integers, layer.integers.T)):
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(-value[::-1]), tensor.name))
    onnx.save(graph, file.with_name("broken.onnx"))
    return file.with_name("broken.onnx")


@pytest.mark.parametrize("form", FORMS)
def test_one_broken_layer_is_blamed_in_every_form(snapped: Any, make_texts: Any, form: str, tmp_path: Path) -> None:
    made, texts = snapped("bert"), make_texts(6)
    file = lowered(made, form, tmp_path, **FORMS[form])
    sound = blame(made.graph, file, texts)
    assert sound.first is None
    assert len(sound.layers) > 40
    found = blame(made.graph, broken(file, BROKEN), texts)
    assert found.first is not None
    assert found.first.module == BROKEN
    assert found.first.sqnr_db < 10 < sound.layers[-1].sqnr_db
    assert found.loudest is not None
    assert found.loudest.module == BROKEN
    assert found.suspects[0] == BROKEN
    assert f"first tensor that leaves tolerance: {found.first.tensor}, module {BROKEN} (" in found.describe()


def test_what_was_fused_away_is_said_not_guessed(snapped: Any, make_texts: Any, tmp_path: Path) -> None:
    made, texts = snapped("bert"), make_texts(4)
    fused = blame(made.graph, lowered(made, "fp32_fused", tmp_path), texts, precision="fp32")
    assert fused.first is None
    assert {name.rpartition(".")[2] for name in fused.absent} <= {"query", "key", "value"}
    assert fused.absent
    assert "not compared, because the graph fused them away: bert.encoder.layer.0.attention.self." in fused.describe()
    whole = blame(made.graph, made.graph, texts, precision="fp32")
    assert whole.absent == ()
    assert {layer.sqnr_db for layer in whole.layers} == {CEILING}
    assert whole.plain_db > 90


def test_padding_and_barred_scores_are_not_noise(snapped: Any, make_texts: Any, tmp_path: Path) -> None:
    made, texts = snapped("bert"), make_texts(6, seed=3)
    assert texts.lengths.min() < LENGTH
    file = lowered(made, "int16_qdq", tmp_path, batch=1, sequence=LENGTH)
    found = blame(made.graph, file, texts, tolerance_db=20.0)
    assert found.first is None
    assert any(layer.operator == "Softmax" for layer in found.layers)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_are_compared_too(snapped: Any, make_images: Any, kind: str, tmp_path: Path) -> None:
    made, images = snapped(kind), make_images(6)
    sound = blame(made.graph, lowered(made, "int8_qdq", tmp_path, batch=1), images, tolerance_db=5.0)
    assert sound.first is None
    assert sound.layers[-1].tensor == "logits"


def test_a_range_that_is_cut_off_is_blamed_on_its_layer(snapped: Any, make_texts: Any, tmp_path: Path) -> None:
    made, texts = snapped("bert"), make_texts(6)
    cut = "/bert/encoder/layer.1/output/dense/Add_output_0"
    ranges = {**made.ranges, cut: tuple(end / 20 for end in made.ranges[cut])}
    file = lower(made.graph, tmp_path / "cut.onnx", "int8_qdq", ranges=ranges, batch=1, sequence=LENGTH)
    found = blame(made.graph, file, texts)
    assert found.first is not None
    assert (found.first.tensor, found.first.module) == (cut, "bert.encoder.layer.1.output.dense")
    assert explain(made.graph, file, texts, "int8")().startswith(f"first tensor that leaves tolerance: {cut}, ")
    told = found.to_dict()
    assert told["first"]["tensor"] == cut
    assert len(told["layers"]) == len(found.layers)


def test_a_few_large_channels_do_not_hide_the_others() -> None:
    signal = np.ones((1, 50, 8), np.float32)
    signal[..., 0] = 1000
    noisy = np.round(signal / 8) * 8  # a step of 8: what is 1 becomes 0
    noise = Noise()
    noise.add(signal, noisy, signal > -1e4)
    assert noise.ratio == 1.0
    assert noise.sqnr_db == 0.0
    assert noise.max_abs == 1.0


def test_noise_of_axes_that_change_and_of_what_is_no_number() -> None:
    noise = Noise()
    for size in (3, 5):
        noise.add(np.ones((1, size), np.float32), np.full((1, size), 1.1, np.float32), np.ones((1, size), bool))
    assert noise.sqnr_db == pytest.approx(20, abs=0.1)
    noise.add(np.ones((1, 5), np.float32), np.full((1, 5), np.nan, np.float32), np.ones((1, 5), bool))
    assert noise.sqnr_db == -CEILING
    zeros = Noise()
    zeros.add(np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3), bool))
    assert zeros.sqnr_db == CEILING
    zeros.add(np.zeros((2, 3)), np.ones((2, 3)), np.ones((2, 3), bool))
    assert zeros.sqnr_db == -CEILING
    assert not Noise().heard
