"""Loss, metric and confidence interval of picking one class."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError

if TYPE_CHECKING:
    import torch

UNLABELLED = -1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits [B, C] over labels [B], in fp32; label -1 does not count.

    Zero, and still differentiable, if no label counts.
    """
    from torch.nn import functional

    if not bool((labels != UNLABELLED).any()):
        return logits.float().sum() * 0.0
    return functional.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED)


def correct(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether the highest logit [N, C] is that of the label [N], for the examples that have one.

    Raises:
        DataError: none has a label.
    """
    known = labels != UNLABELLED
    if not known.any():
        raise DataError("none of the examples has a label, so nothing can be scored; name the label column")
    return np.asarray(logits[known].argmax(axis=-1) == labels[known])


def accuracy(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> float:
    """Share of labelled examples whose label has the highest logit: logits [N, C], labels [N]."""
    return float(correct(logits, labels).mean())


def score_interval(correct: npt.NDArray[np.bool_], level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of an accuracy, from [N] hits and misses (doi:10.1080/01621459.1927.10502953).

    Raises:
        ValueError: there are no examples, or `level` is not between 0 and 1.
    """
    count = len(correct)
    if count == 0 or not 0 < level < 1:
        raise ValueError(f"expected examples and a level between 0 and 1, got {count} and {level}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = float(np.mean(correct))
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
