"""The front as a picture: SVG text that needs no script, no font and no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

WIDTH, HEIGHT = 680, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 48
GREY, BLUE, RED, INK = "#c4cad1", "#4493f8", "#cf222e", "#57606a"


def draw_front(
    points: Sequence[tuple[float, float]],
    front: Sequence[int],
    chosen: int | None,
    *,
    limit: float | None = None,
    labels: tuple[str, str] = ("predicted latency, ms", "proxy (lower is better)"),
) -> str:
    """One `<svg>` element: every candidate, the front as a line, the chosen one with a ring, the limit dashed.

    Args:
        points: (x, y) of each candidate.
        front: indices of those on the front, by x.
        chosen: index of the one taken; None if it is not among them.
        limit: x of the limit.
        labels: what the axes show.
    """
    across = _span([x for x, _ in points] + ([limit] if limit is not None else []))
    up = _span([y for _, y in points])
    places = [(_place(x, across, LEFT, WIDTH - RIGHT), _place(y, up, HEIGHT - BOTTOM, TOP)) for x, y in points]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="candidates of the search" font-family="system-ui, sans-serif" font-size="12">',
        *_axes(across, up, labels),
        *(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{GREY}"/>' for x, y in places),
    ]
    if limit is not None:
        x = _place(limit, across, LEFT, WIDTH - RIGHT)
        lines.append(
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{INK}" stroke-dasharray="4 3"/>'
        )
        lines.append(_text(x - 4, TOP + 10, "limit", "end"))
    if front:
        path = " ".join(f"{places[i][0]},{places[i][1]}" for i in front)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>')
        lines += [f'<circle cx="{places[i][0]}" cy="{places[i][1]}" r="3.5" fill="{BLUE}"/>' for i in front]
    if chosen is not None:
        x, y = places[chosen]
        lines.append(f'<circle cx="{x}" cy="{y}" r="7" fill="none" stroke="{RED}" stroke-width="2"/>')
        lines.append(_text(x, y - 11, "chosen", "middle", RED))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _axes(across: tuple[float, float], up: tuple[float, float], labels: tuple[str, str]) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for value in _ticks(*across):
        x = _place(value, across, LEFT, WIDTH - RIGHT)
        yield f'<line x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 4}" stroke="{INK}"/>'
        yield _text(x, floor + 17, f"{value:.4g}", "middle")
    for value in _ticks(*up):
        y = _place(value, up, floor, TOP)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#eaeef2"/>'
        yield _text(LEFT - 6, y + 4, f"{value:.4g}", "end")
    yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" stroke="{INK}"/>'
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, labels[0], "middle")
    yield _text(8, 16, labels[1], "start")


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 5.5 >= high - low)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    rest = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - rest, high + rest


def _place(value: float, span: tuple[float, float], first: float, last: float) -> float:
    return round(first + (value - span[0]) / (span[1] - span[0]) * (last - first), 1)


def _text(x: float, y: float, text: str, anchor: str, fill: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
