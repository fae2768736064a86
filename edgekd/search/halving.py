"""Successive halving: distill the best candidates a little, keep the better half, distill those for longer.

Jamieson and Talwalkar 2016, arXiv 1502.07943. Untrained scores do not tell depths apart, a few hundred steps do
(Minitron, Muralidharan et al. 2024, arXiv 2407.14679, ranks its candidates anew in this way).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgekd.arch import Arch
from edgekd.files import sha256_json, write_json

Trainer = Callable[["Finalist", int, int], float]
"""`(finalist, rung, steps)` trains it on for so many steps; KL from the teacher on validation, lower is better."""


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A shape to train. `source` is the checkpoint it is, or empty where it is cut from the student."""

    arch: Arch
    source: str = ""

    @property
    def key(self) -> str:
        """A name for files."""
        return sha256_json([self.arch.to_dict(), self.source])[:16]

    def describe(self) -> str:
        """One line for messages."""
        return f"{self.source}: {self.arch.describe()}" if self.source else self.arch.describe()


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a finalist came: its last rung (from 0), the steps of that and its divergence in nats."""

    finalist: Finalist
    rung: int
    steps: int
    divergence: float


def halve(finalists: Sequence[Finalist], train: Trainer, folder: Path, *, steps: int, label: str) -> list[Standing]:
    """Train all finalists, then the better half for twice as long, and so on; the best first.

    Args:
        finalists: at least one.
        train: trains one finalist on from where its last rung left it.
        folder: keeps one JSON file a finalist and rung; a rung that is there is not trained again.
        steps: training steps of all rungs and finalists together.
        label: what results depend on besides finalist and rung; kept results of another label do not count.
    """
    if len(finalists) == 1:
        return [Standing(finalist=finalists[0], rung=-1, steps=0, divergence=0.0)]
    folder.mkdir(parents=True, exist_ok=True)
    field, out = list(finalists), list[Standing]()
    for rung, (count, each) in enumerate(rungs(len(finalists), steps)):
        standings = [_standing(finalist, rung, each, train, folder, label) for finalist in field[:count]]
        standings.sort(key=lambda standing: standing.divergence)
        kept = (count + 1) // 2 if count > 2 else 0
        out = standings[kept:] + out
        field = [standing.finalist for standing in standings[:kept]]
    return out


def rungs(count: int, steps: int) -> list[tuple[int, int]]:
    """Finalists and steps of each, for every rung; the steps double and add up to about `steps`, at least 1 each."""
    sizes = [count]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    share = sum(size * 2**rung for rung, size in enumerate(sizes))
    first = max(steps // share, 1)
    return [(size, first * 2**rung) for rung, size in enumerate(sizes)]


def _standing(finalist: Finalist, rung: int, steps: int, train: Trainer, folder: Path, label: str) -> Standing:
    file = folder / f"{finalist.key}-{rung}.json"
    asked = {"label": label, "rung": rung, "steps": steps}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if {name: kept[name] for name in asked} == asked:
            return Standing(finalist=finalist, rung=rung, steps=steps, divergence=float(kept["divergence"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    divergence = train(finalist, rung, steps)
    write_json(file, {**asked, "divergence": divergence, "shape": finalist.describe(), "arch": asdict(finalist.arch)})
    return Standing(finalist=finalist, rung=rung, steps=steps, divergence=divergence)
