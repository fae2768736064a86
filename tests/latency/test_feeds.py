from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.errors import ModelError
from edgekd.latency.feeds import check_feeds, graph_inputs, read_feeds, resized, synthesize


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


def save(graph: onnx.GraphProto, path: Path) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def scalar_model(tmp_path: Path) -> Path:
    """A rate without a shape, states behind a fixed number of layers, and nameless dimensions."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["signal", "gain"], ["out"]), helper.make_node("Identity", ["state"], ["next"])],
        "scalar",
        [
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "batch", 4]),
            helper.make_tensor_value_info("signal", TensorProto.FLOAT, ["batch", "sequence"]),
            helper.make_tensor_value_info("rate", TensorProto.INT64, []),
            helper.make_tensor_value_info("gain", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "sequence"]),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, "batch", 4]),
        ],
    )
    return save(graph, tmp_path / "scalar.onnx")


def test_numbers_without_a_shape_and_named_values(tmp_path: Path) -> None:
    path = scalar_model(tmp_path)
    feeds = synthesize(path, batch=3, values={"rate": 16000})
    assert feeds.arrays["rate"].shape == ()
    assert int(feeds.arrays["rate"]) == 16000
    assert int(synthesize(path).arrays["rate"]) == 1
    # The batch is the dimension of that name, not the first number of the first input.
    assert feeds.arrays["state"].shape == (2, 3, 4)
    assert (feeds.batch, feeds.sequence) == (3, 64)
    with pytest.raises(ModelError, match=r"--value: unknown input 'rat' \(did you mean 'rate'"):
        synthesize(path, values={"rat": 1})


def test_all_open_dimensions_are_told_at_once(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["state"], ["next"])],
        "nameless",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["?", "unk__7"]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, None, 4]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    path = save(graph, tmp_path / "nameless.onnx")
    with pytest.raises(ModelError) as caught:
        synthesize(path)
    said = str(caught.value)
    assert "input x ?×? leaves axis 1 open" in said
    assert "input state 2×?×4 leaves axis 1 open" in said
    options = said.split("with ")[-1]
    assert options == "--shape x=1,64 --shape state=2,1,4"
    # What it suggests is what it takes.
    shapes = {"x": (1, 64), "state": (2, 1, 4)}
    assert synthesize(path, shapes=shapes).arrays["state"].shape == (2, 1, 4)


def test_given_shapes_are_resized_where_the_graph_is_free(image_model: Path, tmp_path: Path) -> None:
    assert resized(image_model, {"pixel_values": (1, 3, 8, 8)}, batch=4, sequence=None) == {
        "pixel_values": (4, 3, 8, 8)
    }
    path = scalar_model(tmp_path)
    assert resized(path, {"state": (2, 1, 4)}, batch=4, sequence=9) == {"state": (2, 4, 4)}
    assert resized(path, {"signal": (1, 5)}, batch=None, sequence=9) == {"signal": (1, 9)}
    assert resized(path, {"signal": (1, 5, 7)}, batch=4, sequence=9) == {"signal": (1, 5, 7)}


def test_numbers_that_an_input_cannot_hold_are_refused(text_model: Path) -> None:
    for value in (float("nan"), 1.5, 1e30):
        with pytest.raises(ModelError, match="--value input_ids: it takes whole numbers from"):
            synthesize(text_model, values={"input_ids": value})
    assert (synthesize(text_model, values={"input_ids": 7}).arrays["input_ids"] == 7).all()


@pytest.mark.parametrize("batch", [10**13, 10**20])
def test_inputs_larger_than_memory_are_refused(text_model: Path, batch: int) -> None:
    with pytest.raises(ModelError, match="inputs of this size do not fit into memory: input_ids"):
        synthesize(text_model, batch=batch)


def test_given_inputs_are_held_against_the_graph(text_model: Path, static_model: Path, tmp_path: Path) -> None:
    file, ids = tmp_path / "in.npz", np.ones((2, 5), np.int64)
    np.savez(file, input_ids=ids, attention_mask=ids)
    feeds = read_feeds(file)
    assert (feeds.batch, feeds.sequence) == (2, 5)
    check_feeds(text_model, feeds, file)
    with pytest.raises(ModelError, match="input input_ids takes 1×16, got 2×5"):
        check_feeds(static_model, feeds, file)
    np.savez(file, input_id=ids, attention_mask=ids.astype(np.float32))
    with pytest.raises(ModelError) as caught:
        check_feeds(text_model, read_feeds(file), file)
    assert "unknown input 'input_id' (did you mean 'input_ids'?)" in str(caught.value)
    assert "input input_ids is missing; input attention_mask takes int64, got float32" in str(caught.value)


def _pickled(file: Path) -> None:
    np.savez(file, input_ids=np.array([{}], dtype=object))


@pytest.mark.parametrize(
    "write",
    [
        _pickled,
        lambda file: file.write_bytes(b"not an archive"),
        lambda file: file.write_bytes(b"PK\x03\x04 cut off"),
        lambda file: file.write_bytes(b""),
        lambda file: np.save(file.with_suffix(".npy"), np.zeros(3)) or file.with_suffix(".npy").rename(file),
    ],
)
def test_what_is_no_npz_is_refused_without_advice_to_unpickle(write: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "in.npz"
    write(file)
    with pytest.raises(ModelError, match="cannot read the inputs") as caught:
        read_feeds(file)
    assert "pickle" not in str(caught.value)
    assert "numpy.savez('in.npz', input_ids=…)" in str(caught.value)
