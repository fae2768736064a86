"""Image classification: one image, and one of several classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import ModelError, RecipeError
from edgekd.tasks.pixels import Pixels, as_bytes, keeps, look_up, value_table
from edgekd.tasks.score import accuracy, cross_entropy
from edgekd.tasks.task import Ints, Processor, Rows, Task

if TYPE_CHECKING:
    import torch

# Encoded images that take more than this are made anew for every batch.
MEMORY_LIMIT = 2**30
_CHUNK = 512
# Models with position embeddings: they take images of one size only.
_FIXED_SIZE = {"vit", "deit"}


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """N images: rows `rows` of a store, or made from `raw` when asked for.

    Attributes:
        store: uint8 or float32 [M, C, H, W]; None if that would be too large.
        table: float32 value of each byte [C, 256]; None if the images are made by the processor alone.
    """

    pixels: Pixels
    raw: Any
    store: npt.NDArray[Any] | None
    table: npt.NDArray[np.float32] | None
    rows: Ints
    labels: Ints | None
    digests: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Ints:
        """Ones [N]: all images cost the same."""
        return np.ones(len(self.rows), dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images, in order, and of the processor's settings."""
        digest = hashlib.sha256(f"{self.pixels.channels} {self.pixels.hf.to_json_string()}".encode())
        digest.update(b"".join(self.digests[row] for row in self.rows))
        return digest.hexdigest()

    def take(self, indices: Ints) -> EncodedImages:
        """Some of the images; the store is shared."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=self.rows[indices], labels=labels)

    def collate(self, indices: Ints, length: int | None = None) -> dict[str, torch.Tensor]:
        """`pixel_values`, float32 [B, C, H, W]; `length` means nothing here."""
        import torch

        rows = self.rows[indices]
        images = self.store[rows] if self.store is not None else _make(self.pixels, self.table, self.raw, rows)
        return {"pixel_values": torch.from_numpy(images if self.table is None else look_up(self.table, images))}


def _make(pixels: Pixels, table: npt.NDArray[np.float32] | None, raw: Any, rows: Ints) -> npt.NDArray[Any]:
    images = (raw[int(row)] for row in rows)
    return pixels.full(images) if table is None else pixels.move(images)


def load_processor(folder: str | Path) -> Processor:
    """The image processor of a model folder, and the shape its model takes.

    Raises:
        ModelError: the folder lacks a config or processor, or the two do not fit each other.
    """
    from transformers import AutoConfig, AutoImageProcessor

    try:
        config: Any = AutoConfig.from_pretrained(folder)
        # The fast ones need torchvision.
        hf: Any = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{folder} has no usable image processor: {reason}; copy config.json and preprocessor_config.json there"
        ) from None
    channels = int(getattr(config, "num_channels", 3))
    if channels not in (1, 3):
        raise ModelError(f"{folder} takes images of {channels} channels; only 1 (grey) and 3 (RGB) are supported")
    size = _size(getattr(config, "image_size", None)) if config.model_type in _FIXED_SIZE else None
    probe = np.zeros((*(size or (64, 64)), channels), dtype=np.uint8)
    shape = Pixels(hf, channels).full([probe])[0].shape
    if size is not None and shape[1:] != size:
        raise ModelError(
            f"{folder}: preprocessor_config.json makes images of {shape[1]}x{shape[2]} but config.json says the model "
            f"takes {size[0]}x{size[1]}; set `size` in preprocessor_config.json"
        )
    return Processor(hf=hf, input_names=("pixel_values",), shape=(channels, shape[1], shape[2]))


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def encode(processor: Processor, examples: Rows, max_length: int | None = None) -> EncodedImages:
    """Preprocess every image once, or on demand where all of them would not fit into memory.

    Args:
        processor: what `load_processor` gave.
        examples: `image`: PIL images or uint8 arrays [H, W] or [H, W, C].
        max_length: means nothing here.
    """
    channels, height, width = _shape(processor)
    pixels, raw = Pixels(processor.hf, channels), examples.columns["image"]
    table = value_table(pixels)
    store: npt.NDArray[Any] | None = None
    if table is not None and isinstance(raw, np.ndarray) and keeps(pixels, raw.shape[1], raw.shape[2]):
        store = _stacked(raw, channels)
    if store is None and len(raw) * channels * height * width * (4 if table is None else 1) <= MEMORY_LIMIT:
        chunks = [np.arange(start, min(start + _CHUNK, len(raw))) for start in range(0, len(raw), _CHUNK)]
        store = np.concatenate([_make(pixels, table, raw, rows) for rows in chunks])
    digests = examples.digests or [hashlib.sha256(as_bytes(image, channels).tobytes()).digest() for image in raw]
    return EncodedImages(pixels, raw, store, table, np.arange(len(raw)), examples.labels, digests)


def _stacked(raw: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8] | None:
    """A stack [N, H, W(, C)] seen as [N, C, H, W], without a copy; None if the channels differ."""
    stack = raw[..., None] if raw.ndim == 3 else raw
    if stack.shape[3] not in (1, channels):
        return None
    seen: npt.NDArray[np.uint8] = np.broadcast_to(stack, (*stack.shape[:3], channels)).transpose(0, 3, 1, 2)
    return seen


def _shape(processor: Processor) -> tuple[int, int, int]:
    if processor.shape is None:
        raise ModelError("this is not the processor of an image model; load it with load_processor of the same task")
    return processor.shape


def feeds(processor: Processor, batch: int, sequence: int | None) -> dict[str, npt.NDArray[Any]]:
    """Standard normal pixels, float32 [batch, C, H, W].

    Raises:
        RecipeError: a sequence length is given.
    """
    if sequence is not None:
        raise RecipeError(f"sequence is {sequence}, but this model takes images; leave sequence out")
    shape = (batch, *_shape(processor))
    return {"pixel_values": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}


TASK = Task(
    name="image-classification",
    kind="image",
    metric="accuracy",
    auto_class="AutoModelForImageClassification",
    architecture="ForImageClassification",
    load_processor=load_processor,
    encode=encode,
    loss=cross_entropy,
    score=accuracy,
    feeds=feeds,
)
