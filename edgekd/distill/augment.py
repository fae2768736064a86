"""Random changes to images, drawn from torch's generator, so that a resumed run draws the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def shift(images: Tensor) -> Tensor:
    """Move each image `[B, C, H, W]` by up to a fourteenth of its height (2 pixels of 28); edges are repeated."""
    batch, _, height, width = images.shape
    most = max(1, round(height / 14))
    padded = functional.pad(images, (most, most, most, most), mode="replicate")
    offsets = torch.randint(0, 2 * most + 1, (2, batch))
    rows = offsets[0][:, None] + torch.arange(height)
    columns = offsets[1][:, None] + torch.arange(width)
    return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor) -> Tensor:
    """Mirror half of the images `[B, C, H, W]`, left to right."""
    chosen = torch.rand(len(images)) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def shift_flip(images: Tensor) -> Tensor:
    """`shift`, then `flip`."""
    return flip(shift(images))


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"shift": shift, "shift_flip": shift_flip}
