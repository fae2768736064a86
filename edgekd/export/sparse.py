"""What zeros are worth in a file: compressed bytes, and ONNX's own sparse initializers.

Deflate, the method of zip and gzip, finds zeros by itself and keeps the model what every runtime loads after unpacking.
ONNX's coordinates (COO) load as they are, but take 8 bytes for the place of each weight: a float32 matrix shrinks only
beyond two thirds of zeros, an 8-bit one beyond eight ninths. `bench/sparse.py` measures both.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

LEVEL = 6
"""Deflate's usual level."""
_PART = 1 << 20


def compressed_bytes(file: Path) -> int:
    """Bytes of a file after deflate."""
    packer, size = zlib.compressobj(LEVEL), 0
    with file.open("rb") as source:
        while part := source.read(_PART):
            size += len(packer.compress(part))
    return size + len(packer.flush())


def compress(file: Path, output: Path) -> Path:
    """Write a file as gzip; the same bytes give the same bytes."""
    with (
        file.open("rb") as source,
        output.open("wb") as target,
        gzip.GzipFile("", "wb", compresslevel=LEVEL, fileobj=target, mtime=0) as packer,
    ):
        shutil.copyfileobj(source, packer, _PART)
    return output


def sparse_initializers(source: Path, output: Path) -> int:
    """Write an ONNX file whose initializers are coordinates (COO) where that is smaller; how many became so."""
    import onnx

    graph = onnx.load(source)
    kept, count = [], 0
    for tensor in graph.graph.initializer:
        sparse = _coordinates(tensor)
        if sparse is None:
            kept.append(tensor)
        else:
            graph.graph.sparse_initializer.append(sparse)
            count += 1
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    onnx.save(graph, output)
    return count


def _coordinates(tensor: Any) -> Any:
    """The tensor as values and flat indices, or None where that takes as many bytes."""
    from onnx import helper, numpy_helper

    values = numpy_helper.to_array(tensor)
    places = np.flatnonzero(values)
    if len(places) * (8 + values.itemsize) >= values.nbytes or not len(places):
        return None
    return helper.make_sparse_tensor(
        numpy_helper.from_array(values.reshape(-1)[places], tensor.name),
        numpy_helper.from_array(places.astype(np.int64)),
        list(values.shape),
    )


def zero_shares(file: Path) -> dict[str, float]:
    """The share of zeros in every matrix of an ONNX file, by the name of its initializer; integers as they are."""
    import onnx
    from onnx import numpy_helper

    shares = {}
    for tensor in onnx.load(file).graph.initializer:
        if len(tensor.dims) >= 2:
            shares[tensor.name] = float((numpy_helper.to_array(tensor) == 0).mean())
    return shares
