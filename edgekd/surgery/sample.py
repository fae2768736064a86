"""A deterministic sample of examples, in length-sorted batches, for scoring without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from edgekd.tasks import Encoded


def sample_batches(encoded: Encoded, count: int, *, seed: int, batch_size: int = 32) -> list[dict[str, torch.Tensor]]:
    """At most `count` examples, drawn without replacement and batched by length (so little padding is computed)."""
    chosen = np.random.default_rng(seed).permutation(len(encoded))[:count]
    chosen = chosen[np.argsort(encoded.lengths[chosen], kind="stable")]
    return [encoded.collate(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]
