"""How the files of a calibration get their latencies: timed in turns beside a reference model, or by an estimate.

The speed of a machine drifts while it works: frequency, temperature, neighbours. Every round visits all models of a
group and the reference ("anchor"), so each model's time is known as a ratio to the anchor's in the same moment. The
table holds ratio times the anchor's median at its first measurement; what drifts in common cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import Samples, medians
from edgekd.target import Target

ROUNDS = 32
GROUP = Settings(blocks=ROUNDS, block_ms=12.0, min_runs=ROUNDS, warmup_seconds=0.25, max_seconds=120.0)


@dataclass(frozen=True)
class Timed:
    """One model's median over the anchor's, and the relative half width of its 95 % interval (of medians of rounds)."""

    ratio: float
    noise: float
    ms: float


def time_beside(
    anchor: Subject,
    subjects: Sequence[Subject],
    target: Target,
    *,
    batch: int,
    sequence: int | None,
    threads: int,
    settings: Settings = GROUP,
) -> tuple[float, list[Timed]]:
    """The anchor's own median in milliseconds, and each subject timed against it.

    Raises:
        TargetError, ModelError: as `edgekd.latency.bench.measure`.
    """
    first, *others = measure(
        [anchor, *subjects], target=target, batch=batch, sequence=sequence, threads=threads, settings=settings
    )
    reference = _rounds(first)
    return float(np.median(first.ms)), [_timed(_rounds(sample), reference, sample) for sample in others]


def _rounds(samples: Samples) -> npt.NDArray[np.float64]:
    labels, index = np.unique(samples.block, return_inverse=True)
    return medians(samples.ms, index, len(labels))


def _timed(own: npt.NDArray[np.float64], anchor: npt.NDArray[np.float64], samples: Samples) -> Timed:
    ratios = own / anchor
    middle = float(np.median(ratios))
    spread = float(np.subtract(*np.quantile(ratios, (0.75, 0.25))))
    # 1.57 · IQR / √n is the half width of a 95 % interval of a median (McGill, Tukey and Larsen, 1978).
    return Timed(middle, 1.57 * spread / float(np.sqrt(len(ratios))) / middle, float(np.median(samples.ms)))


def feeds_file(arrays: Mapping[str, Any], path: Path) -> Path:
    """Write inputs as .npz."""
    np.savez(path, **dict(arrays))
    return path
