"""Folders of images: one subfolder per class, or images alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgekd.data.images import SUFFIXES
from edgekd.data.table import Table
from edgekd.errors import DataError


def has_images(folder: Path) -> bool:
    """Whether there is an image in the folder, at any depth."""
    return any(_images(folder))


def _images(folder: Path) -> Iterator[Path]:
    """The images below a folder, sorted by path within each folder; what is hidden stays so."""
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(parent) / name


def read_image_folder(folder: Path) -> Table:
    """Columns `image` (paths) and, if the images stand in subfolders, `label` (the name of the subfolder).

    Raises:
        DataError: there are no images, or some stand in class folders and some do not.
    """
    images = list(_images(folder))
    if not images:
        raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}); check the path")
    labels = [path.relative_to(folder).parts[0] for path in images if path.parent != folder]
    if labels and len(labels) < len(images):
        loose = next(path for path in images if path.parent == folder)
        raise DataError(
            f"{folder} has class folders and {len(images) - len(labels):,} images outside of them, such as "
            f"{loose.name}; move those into the folder of their class"
        )
    columns = {"image": images, "label": labels} if labels else {"image": images}
    return Table(f"{folder.name}/", columns, (), {}, folder)
