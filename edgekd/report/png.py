"""Charts as PNG files, drawn by matplotlib, which is optional."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import StoreError
from edgekd.files import explained, write_bytes
from edgekd.report.charts import Chart
from edgekd.report.svg import COLOURS


def require_matplotlib() -> None:
    """See that plots can be drawn.

    Raises:
        StoreError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise StoreError(
            "PNG plots need matplotlib, which is not installed: pip install 'edgekd[plots]'; --report needs nothing"
        ) from None


def write_plots(folder: Path, charts: Sequence[Chart]) -> list[Path]:
    """Write one PNG for each chart into `folder`, named by its key; returns the files.

    Raises:
        StoreError: matplotlib is not installed, or the folder cannot be written.
    """
    require_matplotlib()
    with explained("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in charts:
        files.append(folder / f"{chart.key}.png")
        write_bytes(files[-1], draw(chart))
    return files


def draw(chart: Chart) -> bytes:
    """The bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 1.0 + 0.3 * len(chart.bars) if chart.bars else 3.8
    figure = Figure(figsize=(7.5, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    (_bars if chart.bars else _lines)(axes, chart)
    axes.set_title(_literal(chart.title))
    axes.set_xlabel(_literal(chart.x_label))
    axes.set_ylabel(_literal(chart.y_label))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lines(axes: Any, chart: Chart) -> None:
    for index, line in enumerate(chart.series):
        colour = COLOURS[index % len(COLOURS)]
        marker = "o" if line.points else None
        axes.plot(line.x, line.y, color=colour, label=_literal(line.name), linewidth=1.4, marker=marker, markersize=4)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    for place, label in chart.marks:
        axes.axvline(place, color="#57606a", linestyle="--", linewidth=1)
        axes.annotate(_literal(label), (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                      textcoords="offset points", color="#57606a")  # fmt: skip
    if chart.log:
        axes.set_yscale("log")
    elif chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#d8dee4")
    if len(chart.series) > 1:
        axes.legend(frameon=False)


def _bars(axes: Any, chart: Chart) -> None:
    labels = [_literal(label) for label, _, _ in chart.bars]
    places = range(len(labels))
    drawn = axes.barh(places, [value for _, value, _ in chart.bars], color=COLOURS[0])
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.bar_label(drawn, [_literal(text) for _, _, text in chart.bars], padding=3)
    axes.margins(x=0.15)


def _literal(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
