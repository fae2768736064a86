"""Every candidate that was scored, and those among them that nothing else beats in both proxy and latency."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.arch import Arch
from edgekd.files import write_json, write_text
from edgekd.search.plot import draw_front

FILES = ("front.json", "front.csv", "front.svg")
"""What `Front.write` leaves in the stage's work folder."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape with its proxy (lower is better), its predicted latency in milliseconds, and who proposed it."""

    arch: Arch
    proxy: float
    predicted_ms: float
    by: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "shape": self.arch.describe(),
            "proxy": self.proxy,
            "predicted_ms": self.predicted_ms,
            "by": self.by,
            "arch": self.arch.to_dict(),
        }


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at most equal to in both values and below in one; by the second value."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    found: list[int] = []
    for i in order:
        if not found or points[i][0] < points[found[-1]][0]:
            found.append(i)
    return found


class Front:
    """All candidates of a search, each shape once."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self.candidates = list({candidate.arch: candidate for candidate in candidates}.values())
        self.best = pareto([(candidate.proxy, candidate.predicted_ms) for candidate in self.candidates])

    def rows(self, chosen: Arch | None) -> list[dict[str, Any]]:
        """All candidates as plain data, fastest first, with `front` and `chosen`."""
        on_front = set(self.best)
        order = sorted(range(len(self.candidates)), key=lambda i: self.candidates[i].predicted_ms)
        return [
            {**self.candidates[i].to_dict(), "front": i in on_front, "chosen": self.candidates[i].arch == chosen}
            for i in order
        ]

    def points(self, chosen: Arch | None) -> list[dict[str, Any]]:
        """The front itself and the chosen candidate, without full shapes: what goes into a ledger."""
        rows = [row for row in self.rows(chosen) if row["front"] or row["chosen"]]
        return [{key: value for key, value in row.items() if key != "arch"} for row in rows]

    def write(self, folder: Path, chosen: Arch | None, *, limit: float | None, reason: str) -> None:
        """Write `front.json`, `front.csv` and `front.svg`; `limit` is the latency limit in predicted milliseconds."""
        rows = self.rows(chosen)
        write_json(folder / FILES[0], {"reason": reason, "limit_ms": limit, "points": rows})
        text = io.StringIO()
        names = ("predicted_ms", "proxy", "front", "chosen", "by", "shape")
        table = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(folder / FILES[1], text.getvalue())
        places = [(row["predicted_ms"], row["proxy"]) for row in rows]
        front = [i for i, row in enumerate(rows) if row["front"]]
        taken = next((i for i, row in enumerate(rows) if row["chosen"]), None)
        write_text(folder / FILES[2], draw_front(places, front, taken, limit=limit))
