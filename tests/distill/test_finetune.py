"""Laws of making a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from edgekd.context import Silent
from edgekd.data import DataSpec
from edgekd.distill.augment import AUGMENTATIONS, flip, shift
from edgekd.distill.finetune import Finetune, finetune, finetune_settings
from edgekd.distill.scratch import SCRATCH, make_scratch
from edgekd.errors import DataError, ModelError, RecipeError, StoreError

DIGITS = DataSpec(path="sklearn:digits", limit=128)


def _run(base: str, out: Path, spec: DataSpec = DIGITS, **settings: Any) -> dict[str, Any]:
    return finetune(base, spec, out, settings=Finetune(**settings), seed=0, progress=Silent())


@pytest.mark.parametrize("name", ["vit-small", "resnet-small"])
def test_a_teacher_from_scratch_is_a_plain_transformers_folder(name: str, tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    facts = _run(f"scratch:{name}", out, epochs=1, augment="shift")
    assert json.loads((out / "finetune.json").read_text()) == facts
    assert 0 <= facts["validation"] <= 1
    model = AutoModelForImageClassification.from_pretrained(out)
    processor = AutoImageProcessor.from_pretrained(out, use_fast=False)
    pixels = processor(np.zeros((8, 8, 1), np.uint8), input_data_format="channels_last", return_tensors="pt")
    assert model(**pixels).logits.shape == (1, 10)
    assert model.config.id2label[3] == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_base_gets_a_new_head_and_its_own_folder_again(tmp_path: Path) -> None:
    _run("scratch:vit-small", tmp_path / "base", epochs=1)
    for folder in range(2):
        for label in range(2):
            place = tmp_path / "images" / "train" / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(12):
                pixels = np.random.default_rng([folder, label, i]).integers(0, 120, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels + np.uint8(120 * label)).save(place / f"{folder}-{i}.png")
    out = tmp_path / "teacher"
    for _ in range(2):
        facts = _run(str(tmp_path / "base"), out, DataSpec(path=str(tmp_path / "images")), epochs=1)
    assert facts["task"] == "image-classification"
    assert AutoModelForImageClassification.from_pretrained(out).config.id2label == {0: "class0", 1: "class1"}


def test_the_same_seed_gives_the_same_teacher(tmp_path: Path) -> None:
    weights = []
    for name in "ab":
        _run("scratch:vit-small", tmp_path / name, epochs=1, augment="shift_flip")
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", sorted(SCRATCH))
@pytest.mark.parametrize(("shape", "channels"), [((8, 8), 1), ((28, 28), 1), ((32, 30, 3), 3), ((29, 31), 1)])
def test_scratch_models_suit_the_images(name: str, shape: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    images = np.zeros((2, *shape), np.uint8)
    make_scratch(name, images, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["num_channels"] == len(processor["image_mean"]) == channels
    size = processor["size"]["height"]
    assert size >= max(shape[:2])
    if "patch_size" in config:
        assert size == config["image_size"]
        assert size % config["patch_size"] == 0
        assert 16 <= (size // config["patch_size"]) ** 2 <= 64


def test_augmentations_keep_shape_and_follow_the_generator() -> None:
    images = torch.randn(5, 3, 28, 28)
    for augment in AUGMENTATIONS.values():
        torch.manual_seed(1)
        first = augment(images)
        torch.manual_seed(1)
        assert torch.equal(first, augment(images))
        assert first.shape == images.shape
    assert all(torch.equal(f, i) or torch.equal(f, i.flip(-1)) for f, i in zip(flip(images), images, strict=True))


def test_shift_moves_whole_images() -> None:
    images = torch.zeros(32, 1, 28, 28)
    images[:, 0, 14, 14] = 1
    moved = shift(images)
    places = moved.flatten(1).argmax(-1)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(32))
    assert set((places // 28).tolist()) | set((places % 28).tolist()) <= {12, 13, 14, 15, 16}
    assert len(set(places.tolist())) > 5


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown scratch model 'scratch:vitt' \(did you mean 'scratch:vit'"):
        _run("scratch:vitt", tmp_path / "out")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match=r"no weights.*scratch:vit or scratch:resnet starts without a base"):
        _run(str(bare), tmp_path / "out")
    with pytest.raises(StoreError, match=r"will not replace .*: edgekd finetune did not write it"):
        _run("scratch:vit", bare)
    with pytest.raises(DataError):
        _run("scratch:vit", tmp_path / "out", DataSpec(path=str(tmp_path / "none")))
    with pytest.raises(RecipeError, match="epochs must be at least 1, not 0"):
        Finetune(epochs=0)
    with pytest.raises(RecipeError, match=r"unknown setting 'epoch' \(did you mean 'epochs'\?\); choose one of: augm"):
        finetune_settings({"epoch": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_an_example_that_is_left_over_is_not_trained_on_alone(tmp_path: Path) -> None:
    """Batch normalization over a single value is not defined, and the last stage has one pixel."""
    spec = DataSpec(path="sklearn:digits", limit=17)
    assert _run("scratch:resnet-small", tmp_path / "out", spec, epochs=1, batch_size=16)["steps"] == 2
