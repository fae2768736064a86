"""Models that start from random weights, sized to the images they will see: teachers where there is no base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import RecipeError, unknown

PREFIX = "scratch:"
_LARGEST = 224
_LOOK_AT = 64


def make_scratch(name: str, images: Any, folder: Path) -> None:
    """Write `config.json` and `preprocessor_config.json` of the scratch model `name` for images like these.

    Args:
        name: a key of `SCRATCH`.
        images: PIL images or uint8 arrays [H, W] or [H, W, C].
        folder: where to.

    Raises:
        RecipeError: there is no such scratch model.
    """
    if name not in SCRATCH:
        raise RecipeError(unknown("scratch model", PREFIX + name, [PREFIX + choice for choice in SCRATCH]))
    side, channels = _look(images)
    config = SCRATCH[name](side, channels)
    config.save_pretrained(folder)
    _processor(config.image_size, channels).save_pretrained(folder)


def _look(images: Any) -> tuple[int, int]:
    """The largest side (at most 224) and the channels of the first images."""
    sides, colours = [], []
    for i in range(min(len(images), _LOOK_AT)):
        image = images[i]
        shape = image.shape if isinstance(image, np.ndarray) else (image.height, image.width, len(image.getbands()))
        sides.append(max(shape[:2]))
        colours.append(shape[2] if len(shape) == 3 else 1)
    # Two bands are grey and alpha, which does not make a colour image.
    return min(max(sides), _LARGEST), 3 if max(colours) > 2 else 1


def _processor(side: int, channels: int) -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )


def _patches(side: int) -> tuple[int, int]:
    """(image size, patch size) with 4 to 8 patches of at least 2 pixels a side; odd sizes are rounded up."""
    for per_side in (8, 7, 6, 5, 4):
        if side % per_side == 0 and side // per_side >= 2:
            return side, side // per_side
    per_side = 8 if side > 16 else 4
    patch = max(-(-side // per_side), 2)
    return per_side * patch, patch


def _vit(*, hidden: int, layers: int, heads: int, neurons: int) -> Callable[[int, int], Any]:
    def build(side: int, channels: int) -> Any:
        from transformers import ViTConfig

        size, patch = _patches(side)
        return ViTConfig(
            image_size=size,
            patch_size=patch,
            num_channels=channels,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=neurons,
        )

    return build


def _resnet(*, widths: tuple[int, ...], depths: tuple[int, ...]) -> Callable[[int, int], Any]:
    def build(side: int, channels: int) -> Any:
        from transformers import ResNetConfig

        # The stem quarters the image, so small ones are enlarged first.
        return ResNetConfig(
            image_size=side if side >= 64 else 2 * side,
            num_channels=channels,
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=list(depths),
            layer_type="basic",
        )

    return build


SCRATCH: Mapping[str, Callable[[int, int], Any]] = {
    "vit": _vit(hidden=128, layers=6, heads=4, neurons=512),
    "vit-small": _vit(hidden=64, layers=4, heads=4, neurons=256),
    "resnet": _resnet(widths=(32, 64, 128), depths=(2, 2, 2)),
    "resnet-small": _resnet(widths=(16, 32, 64), depths=(1, 1, 1)),
}
"""Name to a function of (side, channels) that makes the configuration."""
