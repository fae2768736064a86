"""Teacher outputs on disk: computed once for a teacher and its data, read by every epoch, stage and round.

CACHE/teacher-KEY/logits.npy       float32 [N, C]
                  hidden-I.npy     float16 [tokens of all samples, D], sample after sample
                  offsets-I.npy    int64 [N + 1], where each sample's tokens begin
                  output-I.npy     float16 [tokens of all samples, D], what attention of layer I gives
                  output-offsets-I.npy
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.distill.job import Batch
from edgekd.distill.signals import Signals, token_counts
from edgekd.distill.teachers import Source, fingerprint, live, sweep
from edgekd.files import explained, sha256_json

if TYPE_CHECKING:
    from edgekd.context import Progress
    from edgekd.tasks import Encoded

_VERSION = 1
_FP16 = torch.finfo(torch.float16)


def cache_bytes(sizes: Sequence[tuple[int, int]], samples: int, classes: int) -> int:
    """Size on disk of logits, and of hidden states given as (tokens of all samples, width) each."""
    return samples * classes * 4 + sum(tokens * width * 2 + (samples + 1) * 8 for tokens, width in sizes)


def cache_key(teacher: nn.Module, data: Encoded, hidden: Sequence[int], outputs: Sequence[int] = ()) -> str:
    """What the outputs depend on: the teacher's weights, the encoded data (with its length limit), the layers."""
    parts = [_VERSION, fingerprint(teacher), data.fingerprint, len(data), sorted(hidden)]
    return sha256_json([*parts, sorted(outputs)] if outputs else parts)[:24]


def cached(
    teacher: nn.Module,
    data: Encoded,
    *,
    hidden: Sequence[int],
    folder: Path,
    device: torch.device,
    progress: Progress,
    outputs: Sequence[int] = (),
) -> Source:
    """A source of signals that reads the cache, which is built first where it is missing.

    Processes that want the same outputs at the same time wait for the one that computes them.
    """
    path = folder / f"teacher-{cache_key(teacher, data, hidden, outputs)}"
    if not path.is_dir():
        with _locked(path.with_suffix(".lock")):
            if not path.is_dir():
                source = live(teacher, hidden=hidden, outputs=outputs)
                _build(path, source, data, device=device, progress=progress)
    return open_cache(path, hidden, outputs)


def open_cache(path: Path, hidden: Sequence[int], outputs: Sequence[int] = ()) -> Source:
    """Read a finished cache; files that would take much of the memory are mapped, not loaded."""
    logits = torch.from_numpy(np.load(path / "logits.npy"))
    names = {f"hidden-{i}": f"offsets-{i}" for i in hidden} | {f"output-{i}": f"output-offsets-{i}" for i in outputs}
    size = sum((path / f"{name}.npy").stat().st_size for name in names)
    # Copy-on-write mapping: torch refuses to share read-only memory.
    mode: Literal["c"] | None = "c" if size > _free_memory() // 4 else None
    states = {name: torch.from_numpy(np.load(path / f"{name}.npy", mmap_mode=mode)) for name in names}
    offsets = {name: np.load(path / f"{file}.npy") for name, file in names.items()}

    def source(indices: np.ndarray, batch: Batch) -> Signals:
        device = next(iter(batch.values())).device
        rows = {name: _gather(states[name], offsets[name], indices).to(device) for name in names}
        return Signals(
            logits=logits[torch.from_numpy(indices)].to(device),
            hidden={i: rows[f"hidden-{i}"] for i in hidden},
            outputs={i: rows[f"output-{i}"] for i in outputs},
        )

    return source


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def _gather(states: Tensor, offsets: np.ndarray, indices: np.ndarray) -> Tensor:
    """The tokens of the samples, one sample after the other: `[valid tokens, D]`."""
    return torch.cat([states[offsets[i] : offsets[i + 1]] for i in indices])


def _build(path: Path, source: Source, data: Encoded, *, device: torch.device, progress: Progress) -> None:
    """Compute all outputs into a folder beside `path` and rename it when it is complete. The caller holds the lock."""
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with explained("write", partial):
        partial.mkdir(parents=True)
    files: dict[str, np.ndarray] = {}
    progress.start("teacher outputs", len(data))
    try:
        for indices, batch, signals in sweep(source, data, device):
            if not files:
                files = _allocate(partial, data, batch, signals)
            _write(files, indices, batch, signals)
            progress.advance(len(indices))
    finally:
        progress.stop()
    for array in files.values():
        if isinstance(array, np.memmap):
            array.flush()
    os.rename(partial, path)


def _allocate(folder: Path, data: Encoded, batch: Batch, signals: Signals) -> dict[str, np.ndarray]:
    """Create the files in their final size; images have as many tokens per sample as those of the first batch."""
    samples = len(data)
    shape = (samples, signals.logits.shape[1])
    files: dict[str, np.ndarray] = {"logits": _create(folder / "logits.npy", shape, np.float32)}
    for name, offset, rows in _states(signals):
        counts = data.lengths
        if "attention_mask" not in batch:
            counts = np.full(samples, len(rows) // len(signals.logits), np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        np.save(folder / f"{offset}.npy", offsets)
        files[offset] = offsets
        files[name] = _create(folder / f"{name}.npy", (int(offsets[-1]), rows.shape[1]), np.float16)
    return files


def _states(signals: Signals) -> Iterator[tuple[str, str, Tensor]]:
    """Files of states and of their offsets, with the rows `[valid tokens, D]` of a batch."""
    for i, rows in signals.hidden.items():
        yield f"hidden-{i}", f"offsets-{i}", rows
    for i, rows in signals.outputs.items():
        yield f"output-{i}", f"output-offsets-{i}", rows


def _create(file: Path, shape: tuple[int, int], dtype: type[np.generic]) -> np.ndarray:
    array: np.ndarray = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    return array


def _write(files: dict[str, np.ndarray], indices: np.ndarray, batch: Batch, signals: Signals) -> None:
    files["logits"][indices] = signals.logits.float().cpu().numpy()
    for name, offset, rows in _states(signals):
        half = rows.float().clamp(_FP16.min, _FP16.max).half().cpu().numpy()
        offsets, first = files[offset], 0
        for index, count in zip(indices, token_counts(batch, len(rows)).tolist(), strict=True):
            files[name][offsets[index] : offsets[index + 1]] = half[first : first + count]
            first += count


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock; a killed process lets go of it."""
    with explained("lock", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("w")
    with opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
