"""How often the verdict is false, on machines whose truth is known: noise of several shapes, with and without drift.

    python bench/verdict_simulation.py [--trials 1000] [--out bench/results/verdict_simulation.json]

A trial is what `edgekd profile --latency-p95-ms` does: 120 blocks of 3 inferences, judged, and up to three longer looks
while it is inconclusive; only the clock is replaced by a random generator. The truth is the 95th percentile of 600,000
samples of the same process. With the budget at the truth itself, one of `pass` and `fail` is false as soon as the
budget is a hair to one side: the larger of the two is the rate of false verdicts, and that is the worst case. With the
budget 3 % under the truth `pass` is false, and with the budget 3 % over it `fail` is.

`heating` has no such truth, as the machine gets 3 % slower while it is watched; it is held against the state it reaches
in the end, which no measurement of the beginning can know, and shows what the verdict is not worth there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np

from edgekd.latency import stats
from edgekd.latency.stats import Measurement, Samples
from edgekd.latency.verdict import decide

BLOCKS, RUNS = 120, 3
NOISES = ("normal", "lognormal", "gamma", "two modes", "spikes")
DRIFTS = ("none", "waves", "bursts", "regimes", "long regimes", "heating")
MARGINS = {"at the truth": 1.0, "3 % under": 0.97, "3 % over": 1.03}


class Machine:
    """Latencies [blocks, runs] of one noise and one drift; the drift goes on from one look to the next."""

    def __init__(self, noise: str, drift: str, seed: int) -> None:
        self.rng, self.noise, self.drift = np.random.default_rng(seed), noise, drift
        self.time, self.phase, self.level = 0, self.rng.uniform(0, 2 * np.pi), float(self.rng.normal(0, 0.03))

    def take(self, blocks: int) -> np.ndarray:
        ms = self.draw(blocks) * self.factors(blocks)[:, None]
        self.time += blocks
        return ms

    def draw(self, blocks: int) -> np.ndarray:
        rng, shape = self.rng, (blocks, RUNS)
        if self.noise == "normal":
            return rng.normal(1.0, 0.03, shape)
        if self.noise == "gamma":
            return 1.0 + rng.gamma(1.0, 0.1, shape)
        ms = rng.lognormal(0, 0.05, shape)
        if self.noise == "two modes":
            return ms * np.where(rng.random(shape) < 0.2, 1.25, 1.0)
        if self.noise == "spikes":
            return ms + (rng.random(shape) < 0.04) * rng.exponential(1.0, shape)
        return ms

    def factors(self, blocks: int) -> np.ndarray:
        moments = np.arange(self.time, self.time + blocks)
        if self.drift == "waves":
            return 1 + 0.05 * np.sin(2 * np.pi * moments / 40 + self.phase)
        if self.drift == "bursts":
            return np.where(self.rng.random(blocks) < 0.08, 1.3, 1.0)
        if self.drift in ("regimes", "long regimes"):
            return np.exp(self.wander(blocks, 0.7 if self.drift == "regimes" else 0.9))
        if self.drift == "heating":
            return 1 - 0.03 * np.exp(-moments / 60)
        return np.ones(blocks)

    def wander(self, blocks: int, kept: float) -> np.ndarray:
        """A first-order autoregression of 3 % deviation."""
        levels = np.empty(blocks)
        for index, step in enumerate(self.rng.normal(0, 0.03 * np.sqrt(1 - kept**2), blocks)):
            self.level = kept * self.level + step
            levels[index] = self.level
        return levels


def truth(noise: str, drift: str) -> float:
    machine = Machine(noise, drift, 0)
    machine.time = 10_000 if drift == "heating" else 0
    return float(np.quantile(machine.take(200_000), 0.95))


def verdict(noise: str, drift: str, seed: int, budget: float) -> str:
    machine, taken = Machine(noise, drift, seed), []

    def more(look: int) -> Measurement:
        blocks = BLOCKS * 2 ** max(0, look - 1)
        taken.append(Samples(name="m", ms=machine.take(blocks).ravel(), block=np.repeat(np.arange(blocks), RUNS)))
        joined = stats.join(taken)
        (interval,) = stats.intervals(joined.ms, joined.block, (0.95,), level=stats.VERDICT)
        return Measurement(target="t", kind="measured", p95_ms=1.0, p95_ci99_ms=interval, n=len(joined.ms))

    return decide(more, latency_p95_ms=budget)[1].status


def cell(noise: str, drift: str, margin: str, trials: int) -> dict[str, object]:
    budget = truth(noise, drift) * MARGINS[margin]
    counts = Counter(verdict(noise, drift, 1_000_000 + seed, budget) for seed in range(trials))
    rates = {status: counts[status] / trials for status in ("pass", "fail", "inconclusive")}
    false = {"at the truth": ("pass", "fail"), "3 % under": ("pass",), "3 % over": ("fail",)}[margin]
    return {"noise": noise, "drift": drift, "budget": margin, "trials": trials, **rates,
            "worst_false": max(rates[status] for status in false)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench/results/verdict_simulation.json"))
    arguments = parser.parse_args()
    began, rows = time.time(), []
    print(f"{'noise':10} {'drift':13} {'budget':13} {'pass':>6} {'fail':>6} {'open':>6}")
    for drift in DRIFTS:
        for noise in NOISES:
            for margin in MARGINS:
                trials = arguments.trials if margin == "at the truth" else -(-arguments.trials // 4)
                row = cell(noise, drift, margin, trials)
                rows.append(row)
                figures = " ".join(f"{row[status]:6.1%}" for status in ("pass", "fail", "inconclusive"))
                print(f"{noise:10} {drift:13} {margin:13} {figures}", flush=True)
    known = [row for row in rows if row["drift"] != "heating"]
    worst = max(known, key=lambda row: row["worst_false"])
    summary = {"worst_false": worst["worst_false"], "where": [worst[key] for key in ("noise", "drift", "budget")]}
    result = {"seconds": round(time.time() - began), "blocks": BLOCKS, "runs": RUNS, "summary": summary, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"worst false rate (heating aside): {worst['worst_false']:.1%} with {', '.join(summary['where'])}")


if __name__ == "__main__":
    main()
