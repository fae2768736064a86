"""The report as one HTML file that needs nothing else: tables, and bars drawn as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from edgekd.files import write_text
from edgekd.report.terminal import HEADINGS, heading, rows


def write_report(
    file: Path, manifests: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], recipe: str
) -> None:
    """Write `report.html` atomically."""
    environment = Environment(
        loader=PackageLoader("edgekd.report", "."), autoescape=select_autoescape(["html"]), trim_blocks=True
    )
    page = environment.get_template("report.html").render(
        targets=[
            {
                "name": name,
                "manifest": manifest,
                "rows": rows(manifest),
                "heading": heading(manifest, name),
                "bars": _bars(manifest),
                "latency": manifest["latency"][0],
            }
            for name, manifest in manifests.items()
        ],
        verdicts=verdicts,
        recipe=recipe,
        headings=HEADINGS,
    )
    write_text(file, page)


def _bars(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Median latency of teacher, stages and artifact with the share of the longest, for the bar chart."""
    latency = manifest["latency"][0]
    points = [("teacher", latency.get("teacher_p50_ms"))]
    points += [(entry["stage"], entry["latency"].get("p50_ms")) for entry in manifest["ledger"]]
    points.append(("artifact", latency.get("p50_ms")))
    known = [(name, value) for name, value in points if value is not None]
    longest = max((value for _, value in known), default=1.0)
    return [{"name": name, "ms": value, "width": 420 * value / longest} for name, value in known]
