"""The report as one HTML file that needs nothing else: tables, and bars drawn as SVG."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from edgekd.files import write_text
from edgekd.report import gains
from edgekd.report.terminal import HEADINGS, heading, rows

_STAGE_FOLDER = re.compile(r"\d{2,}-[a-z][A-Za-z0-9_-]*")
_LARGEST = 1 << 21
"""Bytes of a picture that the report takes in."""


def write_report(
    file: Path, manifests: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], recipe: str
) -> None:
    """Write `report.html` atomically; the pictures that stages left in their folders beside it are taken into it."""
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
                "gains": gains.gains(manifest),
                "shared": gains.shared(manifest, len(manifests)),
                "fronts": fronts(file.parent, manifest),
            }
            for name, manifest in manifests.items()
        ],
        verdicts=verdicts,
        recipe=recipe,
        headings=HEADINGS,
        gain_headings=gains.HEADINGS,
    )
    write_text(file, page)


def fronts(run: Path, manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """The candidates that stages of this run chose from: `stage`, `reason`, and the picture as a data URI.

    The picture goes into an `<img>`, in which nothing can run or be loaded, whatever the file holds.
    """
    found = []
    for entry in manifest["ledger"]:
        folder = str(entry.get("folder", ""))
        picture = run / folder / "front.svg"
        if not _STAGE_FOLDER.fullmatch(folder) or not picture.is_file() or picture.stat().st_size > _LARGEST:
            continue
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        image = f"data:image/svg+xml;base64,{data}"
        found.append({"stage": str(entry["stage"]), "reason": _reason(run / folder / "front.json"), "image": image})
    return found


def _reason(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _bars(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Median latency of teacher, stages and artifact with the share of the longest, for the bar chart."""
    latency = manifest["latency"][0]
    points = [("teacher", latency.get("teacher_p50_ms"))]
    points += [(entry["stage"], entry["latency"].get("p50_ms")) for entry in manifest["ledger"]]
    points.append(("artifact", latency.get("p50_ms")))
    known = [(name, value) for name, value in points if value is not None]
    longest = max((value for _, value in known), default=1.0)
    return [{"name": name, "ms": value, "width": 420 * value / longest} for name, value in known]
