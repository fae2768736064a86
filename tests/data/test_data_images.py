"""Images: folders, tables that point at them, IDX files."""

from __future__ import annotations

import gzip
import io
import struct
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from edgekd.data.images import open_image
from edgekd.errors import DataError


def picture(seed, kind="PNG", size=(12, 10)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def fill(folder, count, start=0, kind="png"):
    folder.mkdir(parents=True)
    for seed in range(start, start + count):
        (folder / f"{seed}.{kind}").write_bytes(picture(seed, {"jpg": "JPEG"}.get(kind, kind.upper())))


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def test_class_folders_with_and_without_splits(load, tmp_path):
    for split, start in (("train", 0), ("val", 100)):
        for name, at in (("cat", 0), ("dog", 10)):
            fill(tmp_path / split / name, 3, start + at)
    splits = load(tmp_path, id2label=None, kind="image")
    assert splits.label_names == ("cat", "dog")
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (len(splits.validation), splits.test) == (6, None)
    assert splits.train.columns["image"][0].size == (10, 12)
    fill(tmp_path / ".cache/bird", 1)
    fill(tmp_path / "train/.thumbs", 1)
    assert len(load(tmp_path, id2label=None, kind="image").train) == 6
    flat = load(tmp_path / "train", id2label={0: "Dog", 1: "Cat"}, kind="image")
    assert len(flat.train) + len(flat.validation) == 6


def test_images_without_classes_have_no_labels(load, tmp_path):
    fill(tmp_path / "d/train", 5)
    fill(tmp_path / "more", 3, 4)
    splits = load(tmp_path / "d", kind="image", unlabeled=str(tmp_path / "more"))
    assert splits.train.labels is None
    assert len(splits.train) + len(splits.validation) == 7
    assert all(image.size == (10, 12) for image in splits.train.columns["image"])


def test_loose_images_beside_class_folders_are_refused(load, tmp_path):
    fill(tmp_path / "cat", 2)
    (tmp_path / "loose.png").write_bytes(picture(9))
    with pytest.raises(DataError, match=r"class folders and 1 images outside of them, such as loose.png"):
        load(tmp_path, id2label=None, kind="image")


def test_images_in_parquet_are_bytes_or_paths(load, tmp_path):
    fill(tmp_path / "files", 1, 50)
    cells = [{"bytes": picture(n), "path": None} for n in range(4)] + [{"bytes": None, "path": "files/50.png"}]
    pq.write_table(pa.table({"img": cells, "label": [0, 1, 0, 1, 0]}), tmp_path / "train.parquet")
    splits = load(tmp_path, kind="image")
    assert splits.columns == {"image": "img", "label": "label"}
    assert len(splits.train) == 4
    assert {image.size for image in splits.train.columns["image"]} == {(10, 12)}


def test_a_table_may_name_files_beside_it(load, tmp_path):
    fill(tmp_path / "train", 4)
    (tmp_path / "train/metadata.csv").write_text("file_name,label\n" + "".join(f"{n}.png,{n % 2}\n" for n in range(4)))
    assert load(tmp_path, kind="image").columns == {"image": "file_name", "label": "label"}


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_broken_image_is_refused_with_file_and_count(load, tmp_path, kind):
    fill(tmp_path / "cat", 4, 0, kind)
    fill(tmp_path / "dog", 4, 10, kind)
    whole = (tmp_path / f"dog/11.{kind}").read_bytes()
    (tmp_path / f"dog/11.{kind}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"dog/12.{kind}").write_bytes(b"<html>")
    with pytest.raises(
        DataError, match=rf"broken image in row 6, row 7; 2 of 8 rows affected; the first: .*11.{kind}: "
    ):
        load(tmp_path, id2label=None, kind="image")


def test_a_missing_image_is_refused(load, tmp_path):
    (tmp_path / "a.csv").write_text("image,label\nnowhere.png,0\n,1\n")
    with pytest.raises(DataError, match=r"2 of 2 rows affected; the first: .*nowhere.png: No such file"):
        load(tmp_path / "a.csv", kind="image")


def test_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    assert open_image(out.getvalue()).size == (2, 4)


def test_files_are_closed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(path)
        path.write_bytes(b"broken")
        with pytest.raises(OSError, match="cannot identify"):
            open_image(path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_train_and_test(load, tmp_path, packed):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 5)):
        for name, array in (
            (f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 6, 6))),
            (f"{prefix}-labels-idx1-ubyte", np.arange(count) % 3),
        ):
            content = idx(array)
            (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    splits = load(tmp_path, id2label=None, kind="image")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 5)
    assert splits.train.columns["image"].shape == (18, 6, 6)
    assert splits.test.labels.tolist() == [0, 1, 2, 0, 1]
    assert splits.train.take([0, 2]).columns["image"].shape == (2, 6, 6)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(np.zeros((4, 2, 2)))[:-1], idx(np.zeros(4)), "announces 16 bytes but holds 15"),
        (b"PK\x03\x04", idx(np.zeros(4)), "is not an IDX file of unsigned bytes"),
        (idx(np.zeros((4, 2, 2))), idx(np.zeros(3)), r"\[4, 2, 2\] and .* \[3\] do not belong together"),
        (idx(np.zeros((4, 2, 2))), None, "has no labels beside it"),
    ],
)
def test_damaged_idx_files_are_refused(load, tmp_path, images, labels, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    if labels is not None:
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(DataError, match=message):
        load(tmp_path, id2label=None, kind="image")


def test_idx_files_packed_and_unpacked_together_are_refused(load, tmp_path):
    content = idx(np.zeros((4, 2, 2)))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"both .*train-images-idx3-ubyte and train-images-idx3-ubyte.gz are there"):
        load(tmp_path, kind="image")
