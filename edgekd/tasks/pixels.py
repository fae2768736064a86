"""Image preprocessing that gives what transformers' image processor gives, bit for bit, and much sooner.

Such a processor first moves pixels (resize, crop), then maps each by value (rescale, normalize). The second part has
256 cases a channel: read off the processor once, it becomes a table, and images stay one byte a pixel until used. The
first part does nothing to images of the right size. Both claims are checked on noise before they are relied on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekd.errors import ModelError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_PROBE = 32


@dataclass(frozen=True)
class Pixels:
    """An image processor `hf` for images of 1 or 3 `channels`; compared by identity of `hf`."""

    hf: Any
    channels: int

    def move(self, images: Iterable[Any]) -> Bytes:
        """Resize and crop images (PIL or uint8 arrays [H, W(, C)]): uint8 [N, C, h, w]."""
        arrays = [as_bytes(image, self.channels) for image in images]
        moved = [array.transpose(2, 0, 1) for array in arrays]
        others = [index for index, array in enumerate(arrays) if not keeps(self, array.shape[0], array.shape[1])]
        for index, result in zip(others, self._run([arrays[index] for index in others], mapped=False), strict=True):
            moved[index] = result
        stacked: Bytes = _stack(moved)
        return stacked

    def full(self, images: Iterable[Any]) -> Floats:
        """All that the processor does, done by itself: float32 [N, C, h, w]."""
        arrays = [as_bytes(image, self.channels) for image in images]
        values: Floats = _stack(self._run(arrays, mapped=True)).astype(np.float32)
        return values

    def _run(self, arrays: Sequence[Bytes], *, mapped: bool) -> list[Any]:
        if not arrays:
            return []
        off = {} if mapped else {"do_rescale": False, "do_normalize": False}
        try:
            return list(self.hf(list(arrays), input_data_format="channels_last", **off)["pixel_values"])
        except ValueError as error:
            raise ModelError(
                f"the image processor refuses images of {self.channels} channels: {error}; "
                "make image_mean and image_std in preprocessor_config.json fit num_channels in config.json"
            ) from None


@lru_cache(maxsize=64)
def keeps(pixels: Pixels, height: int, width: int) -> bool:
    """Whether resizing and cropping leaves images of this size as they are."""
    noise = _noise(height, width, pixels.channels)
    moved = pixels._run([noise], mapped=False)[0]
    return moved.dtype == np.uint8 and np.array_equal(moved, noise.transpose(2, 0, 1))


@lru_cache(maxsize=8)
def value_table(pixels: Pixels) -> Floats | None:
    """Value of each byte in each channel [C, 256]; None if the processor does not work pixel by pixel."""
    noise = _noise(_PROBE * 3, _PROBE * 2, pixels.channels)
    try:
        moved = pixels._run([noise], mapped=False)[0]
    except ModelError:
        return None
    values = pixels.full([noise])[0]
    if moved.dtype != np.uint8 or moved.shape != values.shape:
        return None
    table = np.zeros((pixels.channels, 256), dtype=np.float32)
    for value in range(256):
        # One flat image a value, so that every value is met whatever the resizing does.
        table[:, value] = pixels.full([np.full_like(noise, value)])[0][:, 0, 0]
    return table if np.array_equal(look_up(table, moved[None])[0], values) else None


def look_up(table: Floats, images: Bytes) -> Floats:
    """The values [N, C, H, W] of bytes [N, C, H, W]."""
    values = np.empty(images.shape, dtype=np.float32)
    for channel, row in enumerate(table):
        np.take(row, images[:, channel], out=values[:, channel])
    return values


def as_bytes(image: Any, channels: int) -> Bytes:
    """A PIL image or uint8 array [H, W(, C)] as uint8 [H, W, channels]."""
    if isinstance(image, np.ndarray):
        flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if flat.ndim == 2:
            return np.repeat(flat[..., None], channels, axis=2)
        if flat.shape[2] == channels:
            return flat
        image = Image.fromarray(image)
    if image.mode.startswith("I;16"):
        return as_bytes((np.asarray(image) >> 8).astype(np.uint8), channels)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[..., None] if array.ndim == 2 else array


def _noise(height: int, width: int, channels: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, size=(height, width, channels), dtype=np.uint8)


def _stack(images: Sequence[Any]) -> Any:
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ModelError(
            f"the image processor gives images of several sizes, such as {shapes[0][1:]} and {shapes[-1][1:]}; "
            "set a fixed height and width as `size` in preprocessor_config.json"
        )
    return np.stack(images)
