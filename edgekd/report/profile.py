"""The report of a profile: one HTML file that needs nothing else, with tables, plots and the figures as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from edgekd.files import write_text
from edgekd.report.charts import Chart, Raw, charts
from edgekd.report.svg import draw

# More raw samples than these would make the page slow; each block's percentiles stand for them.
RAW_SAMPLES = 20_000
PERCENTILES = (
    ("p50", "p50_ms", "ci95_ms"),
    ("p90", "p90_ms", "p90_ci95_ms"),
    ("p95", "p95_ms", "p95_ci95_ms"),
    ("p99", "p99_ms", "p99_ci95_ms"),
    ("mean", "mean_ms", "mean_ci95_ms"),
    ("min", "min_ms", ""),
)
KINDS = {
    "measured": "measured",
    "vendor_estimate": "VENDOR ESTIMATE, not measured",
    "predicted": "predicted, not measured",
    "unavailable": "unavailable: nothing was measured",
}


def write_profile(file: Path, document: Mapping[str, Any], samples: Sequence[Raw]) -> None:
    """Write the page atomically; `document` is the JSON of a profile, `samples` the raw figures of its models.

    Raises:
        StoreError: the file cannot be written.
    """
    write_text(file, page(document, samples, charts(document, samples)))


def page(document: Mapping[str, Any], samples: Sequence[Raw], drawn: Sequence[Chart]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("edgekd.report", "."), autoescape=select_autoescape(["html"]), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(figure=figure, bounds=bounds)
    latency = document["latency"][0]
    return environment.get_template("profile.html").render(
        document=document,
        latency=latency,
        kind=KINDS[latency["kind"]],
        percentiles=[
            (name, latency[key], latency.get(ends)) for name, key, ends in PERCENTILES if latency[key] is not None
        ],
        # `draw` escapes the texts of a chart itself.
        charts=[(chart, Markup(draw(chart))) for chart in drawn],
        embedded={**document, "samples": [_embedded(part) for part in samples]},
    )


def figure(value: float | None, digits: int = 4) -> str:
    """A figure in a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def bounds(interval: Sequence[float | None] | None) -> str:
    """An interval in a table; a question mark for an end that too few samples bound."""
    if interval is None:
        return ""
    low, high = ("?" if end is None else f"{end:.4g}" for end in interval)
    return f"{low} – {high}"


def _embedded(part: Raw) -> dict[str, Any]:
    if len(part.ms) <= RAW_SAMPLES:
        ms = [float(f"{value:.6g}") for value in part.ms]
        return {"name": part.name, "ms": ms, "block": part.block.tolist()}
    blocks = [part.ms[part.block == label] for label in np.unique(part.block)]
    rows = [[float(f"{value:.6g}") for value in np.quantile(block, (0.0, 0.5, 0.95, 1.0))] for block in blocks]
    return {"name": part.name, "n": len(part.ms), "blocks_min_p50_p95_max_ms": rows}
