"""How the files of a calibration get their latencies: timed in turns beside reference models of their own kind.

The speed of a machine drifts while it works: frequency, temperature, neighbours; and it drifts differently for what
computes and what moves memory, for float and for 8 bits. So every group of models of one frame is timed together with
the same few models of that frame. What those took when the frame was begun over what they take in this round is the
machine's speed at this moment; a point is the median over rounds of a model's time at the speed of the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import Samples, medians
from edgekd.target import Target

ROUNDS = 32
GROUP = Settings(blocks=ROUNDS, block_ms=12.0, min_runs=ROUNDS, warmup_seconds=0.25, max_seconds=120.0)


@dataclass(frozen=True)
class Timed:
    """One model: its median in ms at the reference speed, and its plain median `now_ms`.

    `noise` is the relative half width of about the 90 % interval of the first, if rounds are independent.
    """

    ms: float
    noise: float
    now_ms: float


def time_beside(
    references: Sequence[tuple[Subject, float]],
    subjects: Sequence[Subject],
    target: Target,
    *,
    batch: int,
    sequence: int | None,
    threads: int,
    settings: Settings = GROUP,
) -> list[Timed]:
    """Time subjects in turns with references whose medians in ms at the reference speed are known.

    Without references the speed of now is the reference speed.

    Raises:
        TargetError, ModelError: as `edgekd.latency.bench.measure`.
    """
    samples = measure(
        [*(subject for subject, _ in references), *subjects], target=target, batch=batch, sequence=sequence,
        threads=threads, settings=settings,
    )  # fmt: skip
    known, others = samples[: len(references)], samples[len(references) :]
    speeds = [ms / _rounds(sample) for sample, (_, ms) in zip(known, references, strict=True)]
    speed = np.median(speeds, axis=0) if speeds else np.ones(len(_rounds(others[0])))
    return [_timed(_rounds(sample) * speed, sample) for sample in others]


def _rounds(samples: Samples) -> npt.NDArray[np.float64]:
    labels, index = np.unique(samples.block, return_inverse=True)
    return medians(samples.ms, index, len(labels))


def _timed(rounds: npt.NDArray[np.float64], samples: Samples) -> Timed:
    middle = float(np.median(rounds))
    spread = float(np.subtract(*np.quantile(rounds, (0.75, 0.25))))
    # 1.57 · IQR / √n: the notch of a box plot (McGill, Tukey and Larsen, 1978).
    return Timed(middle, 1.57 * spread / float(np.sqrt(len(rounds))) / middle, float(np.median(samples.ms)))
