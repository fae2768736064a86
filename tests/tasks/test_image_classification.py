from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from edgekd.errors import ModelError, RecipeError
from edgekd.tasks import TASKS, example_feeds, image_classification
from edgekd.tasks.pixels import Pixels, as_bytes, keeps, value_table

TASK = TASKS["image-classification"]


def pictures(count, height, width, channels=3):
    shape = (count, height, width) if channels == 1 else (count, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def by_transformers(folder, image, channels):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    array = as_bytes(image, channels)
    return processor(array, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("family", ["vit", "deit", "resnet"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (20, 20), (31, 17), (8, 8)])
def test_pixels_are_those_of_transformers_to_the_bit(image_model, rows, family, channels, size):
    folder = image_model(family, channels=channels)
    processor = TASK.load_processor(folder)
    assert processor.shape == (channels, 16, 16)
    raw = pictures(5, *size, channels)
    encoded = TASK.encode(processor, rows({"image": raw}), None)
    assert encoded.table is not None
    values = encoded.collate(np.array([3, 1]))["pixel_values"]
    assert str(values.dtype) == "torch.float32"
    for ours, index in zip(values.numpy(), (3, 1), strict=True):
        assert np.array_equal(ours, by_transformers(folder, raw[index], channels))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "do_normalize": False},
    ],
)
def test_every_setting_of_the_processor_counts(image_model, rows, settings):
    folder = image_model(**settings)
    raw = pictures(3, 16, 16)
    encoded = TASK.encode(TASK.load_processor(folder), rows({"image": raw}), None)
    for index, ours in enumerate(encoded.collate(np.arange(3))["pixel_values"].numpy()):
        assert np.array_equal(ours, by_transformers(folder, raw[index], 3))


def test_a_stack_of_the_right_size_is_not_copied(image_model, rows):
    processor = TASK.load_processor(image_model(channels=3))
    raw = pictures(4, 16, 16, 1)
    encoded = TASK.encode(processor, rows({"image": raw}), None)
    assert np.shares_memory(encoded.store, raw)
    assert not keeps(Pixels(processor.hf, 3), 17, 16)


def test_images_too_many_for_memory_are_made_by_the_batch(image_model, rows, monkeypatch):
    processor = TASK.load_processor(image_model())
    examples = rows({"image": [Image.fromarray(array) for array in pictures(6, 20, 20)]})
    kept = TASK.encode(processor, examples, None)
    monkeypatch.setattr(image_classification, "MEMORY_LIMIT", 100)
    lazy = TASK.encode(processor, examples, None)
    assert kept.store is not None
    assert lazy.store is None
    order = np.array([5, 0, 2])
    assert (kept.collate(order)["pixel_values"] == lazy.collate(order)["pixel_values"]).all()
    assert kept.fingerprint == lazy.fingerprint
    assert (lazy.take(order).collate(np.array([1]))["pixel_values"] == kept.collate(order[1:2])["pixel_values"]).all()


class Contrast:
    """A processor that does not work pixel by pixel: it subtracts the mean of each image."""

    def __init__(self, hf):
        self.hf = hf

    def to_json_string(self):
        return "contrast"

    def __call__(self, images, **settings):
        out = self.hf(images, **settings)
        if settings.get("do_normalize", True):
            out["pixel_values"] = [values - values.mean() for values in out["pixel_values"]]
        return out


def test_a_processor_that_is_no_table_is_run_itself(image_model, rows):
    from dataclasses import replace

    processor = TASK.load_processor(image_model())
    odd = replace(processor, hf=Contrast(processor.hf))
    assert value_table(Pixels(odd.hf, 3)) is None
    raw = pictures(3, 16, 16)
    values = TASK.encode(odd, rows({"image": raw}), None).collate(np.arange(3))["pixel_values"].numpy()
    plain = TASK.encode(processor, rows({"image": raw}), None).collate(np.arange(3))["pixel_values"].numpy()
    assert np.allclose(values, plain - plain.mean(axis=(1, 2, 3), keepdims=True), atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_become_bytes(mode, channels):
    image = Image.new("I;16", (4, 3), 65535) if mode == "I;16" else Image.new("RGB", (4, 3), "white").convert(mode)
    array = as_bytes(image, channels)
    assert array.shape == (3, 4, channels)
    assert array.dtype == np.uint8
    assert (array == 255).all()


def test_grey_and_colour_are_converted(image_model, rows):
    grey, colour = pictures(1, 5, 5, 1)[0], pictures(1, 5, 5)[0]
    assert (as_bytes(grey, 3) == grey[..., None]).all()
    assert (as_bytes(grey[..., None], 1)[..., 0] == grey).all()
    assert (as_bytes(colour, 1)[..., 0] == np.asarray(Image.fromarray(colour).convert("L"))).all()
    processor = TASK.load_processor(image_model(channels=1))
    assert TASK.encode(processor, rows({"image": pictures(2, 16, 16)}), None).store.shape == (2, 1, 16, 16)


def test_fingerprints_are_of_images_and_settings(image_model, rows):
    raw = pictures(4, 16, 16)
    first = TASK.load_processor(image_model())
    other = TASK.load_processor(image_model("deit"))
    whole = TASK.encode(first, rows({"image": raw}), None)
    assert whole.fingerprint == TASK.encode(first, rows({"image": list(raw)}), None).fingerprint
    assert whole.fingerprint != TASK.encode(other, rows({"image": raw}), None).fingerprint
    assert whole.fingerprint != whole.take(np.array([0, 1])).fingerprint
    assert whole.lengths.tolist() == [1] * 4


def test_feeds_are_pixels(image_model):
    processor = TASK.load_processor(image_model("resnet", size=24))
    feeds = example_feeds(TASK, processor, {}, 2)
    assert list(feeds) == ["pixel_values"]
    assert feeds["pixel_values"].shape == (2, 3, 24, 24)
    assert feeds["pixel_values"].dtype == np.float32
    with pytest.raises(RecipeError, match="sequence is 8, but this model takes images"):
        example_feeds(TASK, processor, {}, 2, 8)


def test_processors_that_do_not_fit_are_refused(image_model, tmp_path, rows):
    (tmp_path / "void").mkdir()
    with pytest.raises(ModelError, match=r"void has no usable image processor: .*; copy config.json and"):
        TASK.load_processor(tmp_path / "void")
    folder = image_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 24}))
    with pytest.raises(ModelError, match=r"makes images of 16x16 but config.json says the model takes 24x24"):
        TASK.load_processor(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_channels": 4}))
    with pytest.raises(ModelError, match="images of 4 channels; only 1"):
        TASK.load_processor(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_channels": 1}))
    with pytest.raises(ModelError, match=r"refuses images of 1 channels: .*; make image_mean and image_std"):
        TASK.load_processor(folder)
    loose = image_model("vit", size=20, do_resize=False)
    with pytest.raises(ModelError, match=r"images of several sizes, such as \(20, 20\) and \(22, 22\); set a fixed"):
        TASK.encode(TASK.load_processor(loose), rows({"image": [pictures(1, 20, 20)[0], pictures(1, 22, 22)[0]]}), None)
