"""Images that are opened when asked for, and the check that all of them can be."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

Ref = Path | bytes | npt.NDArray[np.uint8]
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Images(Sequence[Any]):
    """References to images: paths, encoded bytes or uint8 arrays. An item is a PIL image, or the array as it is."""

    refs: Sequence[Ref]

    def __len__(self) -> int:
        return len(self.refs)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Images: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Images(self.refs[index])
        ref = self.refs[index]
        return ref if isinstance(ref, np.ndarray) else open_image(ref)

    def take(self, indices: npt.NDArray[np.int64]) -> Images:
        """The images at `indices`."""
        return Images([self.refs[i] for i in indices])

    @staticmethod
    def refs_of(values: Images | npt.NDArray[np.uint8]) -> list[Ref]:
        """The references of a column of images, whichever way it is held."""
        return list(values) if isinstance(values, np.ndarray) else list(values.refs)


def open_image(ref: Path | bytes) -> Image.Image:
    """Decode one image and turn it the way its EXIF orientation says, as `datasets` does."""
    with Image.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def to_ref(value: Any, folder: Path) -> Ref | None:
    """What a table cell refers to: a path relative to `folder`, bytes, or the {bytes, path} pairs of `datasets`."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str) and value.strip():
        return folder / Path(value.strip()).expanduser()
    return value if isinstance(value, Path) or (isinstance(value, bytes) and value) else None


def inspect(refs: Sequence[Ref | None]) -> tuple[list[bytes], list[tuple[int, str]]]:
    """Read every image once: the SHA-256 of each, and (row, what is wrong) of those that cannot be decoded."""
    digests: list[bytes] = []
    broken: list[tuple[int, str]] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        for row, (digest, problem) in enumerate(pool.map(_inspect_one, refs, chunksize=64)):
            digests.append(digest)
            if problem:
                broken.append((row, problem))
    return digests, broken


def array_digests(images: npt.NDArray[np.uint8]) -> list[bytes]:
    """SHA-256 of each image of a stack [N, H, W] or [N, H, W, C]."""
    return [_array_digest(image) for image in images]


def _array_digest(image: npt.NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def _inspect_one(ref: Ref | None) -> tuple[bytes, str]:
    if ref is None:
        return b"", "no image given"
    if isinstance(ref, np.ndarray):
        return _array_digest(ref), ""
    name = f"{ref}: " if isinstance(ref, Path) else ""
    try:
        content = ref.read_bytes() if isinstance(ref, Path) else ref
    except OSError as error:
        return b"", f"{name}{error.strerror}"
    try:
        _decode_cheaply(content)
    except _BROKEN as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        return b"", f"{name}{reason}"
    return hashlib.sha256(content).digest(), ""


def _decode_cheaply(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image:
        # Reads all of a JPEG, so a cut one is found, at an eighth of its size: a fraction of the time.
        image.draft("L", (1, 1))
        image.load()
