"""The comparison as SVG: accuracy retained against speedup, one colour for each tool, and the front as a line."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 60, 230, 24, 48
COLOURS = {
    "teacher": "#57606a", "ort": "#1b6ca8", "openvino": "#8a4fa3", "olive": "#3a7d44", "inc": "#b08800",
    "kd": "#6e4b2a", "edgekd": "#d1242f",
}  # fmt: skip
LEAST = 80.0
"""Artifacts that retain less are drawn at the lower edge."""


def draw(rows: Sequence[dict[str, Any]], *, across: str, up: str) -> str:
    """One `<svg>`: every measured and scored artifact with its title."""
    drawn = [row for row in rows if row.get("speedup") and row.get("accuracy") is not None]
    fastest = max([float(row["speedup"]) for row in drawn], default=1.0) * 1.05
    kept = [100 * float(row["retained"]) for row in drawn]
    low = max(min(kept, default=100.0) - 1.0, LEAST)
    high = max([*kept, 100.0]) + 1.0

    def x(value: float) -> float:
        return LEFT + value / fastest * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (max(value, low) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for tick in ticks(0.0, fastest):
        lines.append(text(x(tick), HEIGHT - BOTTOM + 17, f"{tick:g}×", "middle"))
    for tick in ticks(low, high):
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#eaeef2"/>')
        lines.append(text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    lines.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, across, "middle"))
    lines.append(text(8, 14, up, "start"))
    corners = " ".join(f"{x(row['speedup']):.1f},{y(100 * row['retained']):.1f}" for row in front(drawn))
    lines.append(f'<polyline points="{corners}" fill="none" stroke="#c4cad1" stroke-width="1.5"/>')
    taken: list[tuple[float, float, float]] = []
    for row in sorted(drawn, key=lambda row: (y(100 * row["retained"]), row["speedup"])):
        colour = COLOURS.get(row["peer"], "#000000")
        place = x(row["speedup"]), y(100 * row["retained"])
        words = row["title"] + (" (lower)" if 100 * row["retained"] < low else "")
        left, line = place[0] + 9, free(taken, place[0] + 9, place[1] + 4, len(words))
        lines.append(f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="4" fill="{colour}"/>')
        lines.append(
            f'<line x1="{place[0]:.1f}" y1="{place[1]:.1f}" x2="{left - 1:.1f}" y2="{line - 4:.1f}" '
            f'stroke="{colour}" stroke-width="0.7"/>'
        )
        lines.append(text(left, line, words, "start", colour))
    return "\n".join([*lines, "</svg>"]) + "\n"


def free(taken: list[tuple[float, float, float]], left: float, line: float, letters: int) -> float:
    """The line nearest to one wished where words of so many letters cover none of those `taken`, to which they go."""
    right = left + 5.6 * letters
    for step in range(60):
        wished = line + (step + 1) // 2 * 6 * (1 if step % 2 else -1)
        if all(abs(wished - other) >= 12 or right < start or end < left for start, end, other in taken):
            break
    taken.append((left, right, wished))
    return wished


def front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Artifacts that no other beats in both, the slowest first."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: -row["speedup"]):
        if not best or row["retained"] > best[-1]["retained"]:
            best.append(row)
    return best[::-1]


def ticks(low: float, high: float) -> list[float]:
    """Whole steps between two ends, about eight of them."""
    step = next(size for size in (0.5, 1, 2, 5, 10, 20, 50) if (high - low) / size <= 10)
    first = int(-(-low // step))
    return [number * step for number in range(first, int(high // step) + 1)]


def text(x: float, y: float, words: str, anchor: str, fill: str = "#57606a") -> str:
    """Some words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="11">{escape(words)}</text>'
