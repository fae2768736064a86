from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.latency import remarks as module
from edgekd.latency.remarks import Surroundings, boosts, remarks, surroundings
from edgekd.latency.stats import Measurement, Samples
from edgekd.target import Target

CALM = Measurement(target="t", kind="measured", p50_ms=1.0, ci95_ms=(0.99, 1.01))


def taken(**more: Any) -> Samples:
    return Samples(name="m", ms=np.ones(100), block=np.arange(100), **more)


def test_a_quiet_machine_is_not_remarked_on() -> None:
    facts = {"load": 0.1, "governor": "performance", "mhz_before": 3000.0, "mhz_after": 2990.0, "max_mhz": 3000.0,
             "celsius_before": 50.0, "celsius_after": 55.0}  # fmt: skip
    assert remarks(CALM, [taken(facts=facts)], Surroundings(load=0.0, cores=4)) == ()
    assert remarks(CALM, [taken()], Surroundings()) == ()


@pytest.mark.parametrize(
    ("measurement", "samples", "around", "remark"),
    [
        (CALM, {"settled": False}, {}, "the warm-up did not come to rest"),
        (CALM, {"preemptions": 6}, {}, "took the core away 6 times"),
        (CALM, {}, {"load": 3.0, "cores": 4}, "busy before the measurement began (load average 3.0)"),
        (CALM, {"facts": {"load": 3.5}}, {"load": 0.0, "cores": 4}, "load average 3.5"),
        (CALM, {}, {"governor": "powersave"}, "governor is 'powersave'"),
        (CALM, {"facts": {"governor": "ondemand"}}, {}, "governor is 'ondemand'"),
        (CALM, {}, {"boost": True}, "beyond its nominal frequency"),
        (CALM, {"facts": {"mhz_before": 3000.0, "mhz_after": 2800.0}}, {}, "start, 2800 MHz at the end"),
        (CALM, {"facts": {"mhz_after": 2000.0, "max_mhz": 3000.0}}, {}, "2000 MHz of at most 3000"),
        (CALM, {"facts": {"celsius_before": 60.0, "celsius_after": 85.0}}, {}, "hot (85 °C"),
        (CALM, {"facts": {"celsius_before": 40.0, "celsius_after": 52.0}}, {}, "from 40 to 52 °C"),
        (Measurement(target="t", kind="measured", p50_ms=1.0, ci95_ms=(0.8, 1.2)), {}, {}, "wider than ±5%"),
        (Measurement(target="t", kind="measured", p50_ms=1.0, ci95_ms=(0.9, float("inf"))), {}, {}, "wider than ±5%"),
    ],
)  # fmt: skip
def test_each_trouble_is_one_sentence(
    measurement: Measurement, samples: dict[str, Any], around: dict[str, Any], remark: str
) -> None:
    (said,) = remarks(measurement, [taken(**samples)], Surroundings(**around))
    assert remark in said
    assert "\n" not in said


def drifting(change: float, seed: int) -> Samples:
    """120 blocks of 3 samples with 2 % noise and a slow wave, slower by `change` at the end."""
    rng, block = np.random.default_rng(seed), np.repeat(np.arange(120), 3)
    ms = rng.lognormal(0, 0.02, 360) * (1 + 0.01 * np.sin(block / 5)) * np.linspace(1, 1 + change, 360)
    return Samples(name="m", ms=ms, block=block)


def test_a_trend_is_told_from_noise_and_waves() -> None:
    assert not [seed for seed in range(50) if remarks(CALM, [drifting(0.0, seed)], Surroundings())]
    for change, word in ((0.12, "slower"), (-0.12, "faster")):
        (said,) = remarks(CALM, [drifting(change, 0)], Surroundings())
        assert word in said


def test_boost_is_read_where_the_kernel_tells(tmp_path: Path) -> None:
    assert boosts(tmp_path) is None
    for place, text, expected in [("cpufreq/boost", "1\n", True), ("cpufreq/boost", "0\n", False)]:
        file = tmp_path / "sys/devices/system/cpu" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        assert boosts(tmp_path) is expected
    file.unlink()
    intel = tmp_path / "sys/devices/system/cpu/intel_pstate/no_turbo"
    intel.parent.mkdir()
    intel.write_text("1\n")
    assert boosts(tmp_path) is False


def test_this_machine_says_nothing_about_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.host, "load_average", lambda: 99.0)
    here = {"name": "t", "title": "t", "runtime": "onnxruntime", "device": "cpu", "precisions": ("fp32",)}
    assert surroundings(Target(**here)).load == 99.0
    assert surroundings(Target(**here, reach={"ssh": {"host": "board"}})) == Surroundings()
