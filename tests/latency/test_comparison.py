from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgekd.latency.comparison import compare, conclude, judged
from edgekd.latency.stats import Measurement


@pytest.mark.parametrize(
    ("interval", "status"),
    [
        ((1.02, 1.5), "faster"),
        ((0.5, 0.98), "slower"),
        ((0.9, 1.2), "unclear"),
        ((0.995, 1.005), "same"),
        ((1.002, 1.008), "same"),
        ((1.002, 1.03), "faster"),
    ],
)
def test_the_whole_interval_says_which_is_faster(interval: tuple[float, float], status: str) -> None:
    ratio = math.sqrt(interval[0] * interval[1])
    assert judged(ratio, interval) == status
    mirrored = (1 / interval[1], 1 / interval[0])
    opposite = {"faster": "slower", "slower": "faster"}.get(status, status)
    assert judged(1 / ratio, mirrored) == opposite


def test_the_sentence_has_the_ratio_its_interval_and_its_kind() -> None:
    assert conclude("faster", 1.42, (1.4, 1.44), "measured") == "B is 1.42× faster than A (99 % interval 1.4–1.44)"
    assert conclude("slower", 0.5, (0.4, 0.625), "measured") == "B is 2× slower than A (99 % interval 1.6–2.5)"
    assert "cannot be told apart (ratio 1.01" in conclude("unclear", 1.01, (0.98, 1.04), "measured")
    assert "same time within 1%" in conclude("same", 1.001, (0.999, 1.003), "measured")
    assert conclude("faster", 2.0, None, "vendor_estimate") == "B is 2× faster than A (vendor estimate, no interval)"


def test_a_comparison_needs_a_ratio() -> None:
    alone = Measurement(target="t", kind="measured", p50_ms=1.0)
    with pytest.raises(ValueError, match="no speedup"):
        compare(Path("a"), Path("b"), alone, alone)
