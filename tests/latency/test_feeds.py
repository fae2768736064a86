from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgekd.errors import ModelError
from edgekd.latency.feeds import graph_inputs, synthesize


def test_token_ids_stay_within_the_lookup_table_and_masks_are_ones(text_model: Path) -> None:
    feeds = synthesize(text_model, batch=3, sequence=40)
    ids = feeds.arrays["input_ids"]
    assert (feeds.batch, feeds.sequence) == (3, 40)
    assert ids.shape == (3, 40)
    assert ids.dtype == np.int64
    assert ids.min() >= 1
    assert ids.max() < 50
    assert (feeds.arrays["attention_mask"] == 1).all()


def test_initializers_are_not_inputs(text_model: Path) -> None:
    assert [item.name for item in graph_inputs(text_model)] == ["input_ids", "attention_mask"]


def test_the_same_seed_gives_the_same_inputs(text_model: Path) -> None:
    one, two, other = (synthesize(text_model, seed=seed).arrays["input_ids"] for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_fixed_shapes_decide(static_model: Path) -> None:
    feeds = synthesize(static_model)
    assert (feeds.batch, feeds.sequence) == (1, 16)
    with pytest.raises(ModelError, match="fixed sequence of 16, not 64: ask for 16"):
        synthesize(static_model, sequence=64)
    with pytest.raises(ModelError, match="fixed batch of 1, not 2"):
        synthesize(static_model, batch=2)


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [
        ("config.json", {"num_channels": 1, "image_size": 28}, (1, 1, 28, 28)),
        ("preprocessor_config.json", {"size": {"height": 8, "width": 9}}, (1, 3, 8, 9)),
        ("preprocessor_config.json", {"size": {"shortest_edge": 12}}, (1, 3, 12, 12)),
        ("preprocessor_config.json", {"size": {"shortest_edge": 12}, "crop_size": 10, "do_center_crop": True},
         (1, 3, 10, 10)),
    ],
)  # fmt: skip
def test_image_size_comes_from_the_configuration_one_folder_up(
    image_model: Path, name: str, config: dict[str, object], size: tuple[int, ...]
) -> None:
    (image_model.parent.parent / name).write_text(json.dumps(config))
    assert synthesize(image_model).arrays["pixel_values"].shape == size


def test_an_open_image_size_asks_for_the_shape(image_model: Path) -> None:
    with pytest.raises(ModelError, match=r"leaves num_channels, height, width open.*--shape pixel_values=1,3,224,224"):
        synthesize(image_model)
    assert synthesize(image_model, shapes={"pixel_values": (1, 3, 5, 6)}).arrays["pixel_values"].shape == (1, 3, 5, 6)


def test_shapes_that_do_not_fit_are_refused(static_model: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown input 'input_id' \(did you mean 'input_ids'\?\)"):
        synthesize(static_model, shapes={"input_id": (1, 16)})
    for shape in ((1, 17), (16,)):
        with pytest.raises(ModelError, match="the model takes 1×16"):
            synthesize(static_model, shapes={"input_ids": shape})


def test_a_file_that_is_not_onnx_is_named(tmp_path: Path) -> None:
    for content in (b"not a model", b""):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.onnx is not an ONNX model"):
            synthesize(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="there is no model file"):
        synthesize(tmp_path / "none.onnx")
