"""Charts as SVG text: a page with them needs no script, no font and no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from edgekd.report.charts import Chart, Series

WIDTH, HEIGHT = 680, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 26, 44
BAR, LABEL = 24, 210
COLOURS = ("#4493f8", "#d4722b", "#2da44e", "#8250df", "#bf3989", "#6e7781")
Span = tuple[float, float]


def draw(chart: Chart) -> str:
    """One `<svg>` element; every text of the chart is escaped."""
    lines = _bars(chart) if chart.bars else _lines(chart)
    height = BAR * len(chart.bars) + 12 if chart.bars else HEIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(chart.title)}" font-family="system-ui, sans-serif" font-size="12">'
    )
    return "\n".join([head, *lines, "</svg>"])


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers within a span, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def steps(low: float, high: float) -> list[float]:
    """Values of the series 1, 2, 5, 10 … within a span over zero; round numbers where there are not two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high]
    return found if len(found) >= 2 else ticks(low, high)


@dataclass(frozen=True)
class Scale:
    """The span of the vertical axis, over zero if it is logarithmic."""

    low: float
    high: float
    log: bool = False


def _lines(chart: Chart) -> Iterator[str]:
    across = _span([value for line in chart.series for value in line.x])
    heights = [value for line in chart.series for value in (*line.y, *line.low, *line.high)]
    up = Scale(*_span(heights, zero=chart.from_zero and not chart.log), log=chart.log)
    yield from _axes(chart, across, up)
    for index, line in enumerate(chart.series):
        colour = COLOURS[index % len(COLOURS)]
        yield from _line(line, colour, across, up)
        if len(chart.series) > 1:
            yield _text(LEFT + 8 + 150 * index, TOP - 10, line.name, fill=colour)
    for place, label in chart.marks:
        if across[0] <= place <= across[1]:
            x = _x(place, across)
            yield f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#57606a" stroke-dasharray="4 3"/>'
            yield _text(x, TOP + 11, f" {label}", fill="#57606a", anchor="start" if x < WIDTH - 60 else "end")


def _line(line: Series, colour: str, across: Span, up: Scale) -> Iterator[str]:
    if line.low:
        there = [f"{_x(x, across)},{_y(y, up)}" for x, y in zip(line.x, line.high, strict=True)]
        back = [f"{_x(x, across)},{_y(y, up)}" for x, y in zip(line.x, line.low, strict=True)]
        yield f'<polygon points="{" ".join(there + back[::-1])}" fill="{colour}" fill-opacity=".18"/>'
    spots = [(_x(x, across), _y(y, up)) for x, y in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{x},{y}" for x, y in spots)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    if line.points:
        yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in spots)
    for (x, _), low, high in zip(spots, line.low, line.high, strict=False):
        if line.points:
            yield f'<line x1="{x}" x2="{x}" y1="{_y(low, up)}" y2="{_y(high, up)}" stroke="{colour}"/>'


def _axes(chart: Chart, across: Span, up: Scale) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for value in steps(up.low, up.high) if up.log else ticks(up.low, up.high):
        y = _y(value, up)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#d8dee4"/>'
        yield _text(LEFT - 6, y + 4, f"{value:.6g}", anchor="end")
    for value in ticks(*across):
        x = _x(value, across)
        yield f'<line x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 4}" stroke="#57606a"/>'
        yield _text(x, floor + 17, f"{value:.6g}", anchor="middle")
    yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" stroke="#57606a"/>'
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x_label, anchor="middle", fill="#57606a")
    yield _text(4, 12, chart.y_label, fill="#57606a")


def _bars(chart: Chart) -> Iterator[str]:
    longest = max(value for _, value, _ in chart.bars) or 1.0
    for index, (label, value, text) in enumerate(chart.bars):
        y, length = BAR * index + 6, (WIDTH - LABEL - 110) * value / longest
        yield _text(LABEL - 8, y + 13, _shorten(label), anchor="end")
        yield f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR - 8}" fill="{COLOURS[0]}"/>'
        yield _text(LABEL + length + 6, y + 13, text)


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#1b1f24") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'


def _shorten(label: str, most: int = 32) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _span(values: Sequence[float], *, zero: bool = False) -> Span:
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), high * 1.05
    return (low, high) if high > low else (low - abs(low) * 0.05 - 1e-9, high + abs(high) * 0.05 + 1e-9)


def _x(value: float, span: Span) -> float:
    return round(LEFT + (value - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, scale: Scale) -> float:
    share = (value - scale.low) / (scale.high - scale.low)
    if scale.log:
        share = math.log(value / scale.low) / math.log(scale.high / scale.low)
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)
