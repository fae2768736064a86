"""Does a target run what is in a graph? Asked before a device or compiler is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgekd.export.static import free_dimensions
from edgekd.target import Target

STANDARD = ("", "ai.onnx")


def check_operators(graph: Any | Path, target: Target) -> list[str]:
    """What in an ONNX graph the target does not run, one line each; an empty list if it runs everything.

    Operators are named by type (`Erf`) or, outside the standard, by domain and type (`com.microsoft.Gelu`); a bare
    name in the target's lists means the standard operator.

    Args:
        graph: ModelProto, or the path of one.
        target: its `operators`, if any, are all that it runs; `unsupported_operators` never run; with
            `shapes: static` no dimension may be free.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False) if isinstance(graph, Path) else graph
    counts = Counter(_name(node.domain, node.op_type) for node in _nodes(model.graph))
    problems = []
    if target.shapes == "static" and (free := free_dimensions(model)):
        problems.append(f"{target.name} needs static shapes: {', '.join(free)}")
    allowed = {_plain(name) for name in target.operators}
    refused = {_plain(name) for name in target.unsupported_operators}
    for name, count in sorted(counts.items()):
        if name in refused or (allowed and name not in allowed):
            problems.append(f"{target.name} does not run {name} ({count} in the graph)")
    return problems


def _nodes(graph: Any) -> list[Any]:
    """All nodes, those within If, Loop and Scan too."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found += _nodes(inner)
    return found


def _name(domain: str, kind: str) -> str:
    return kind if domain in STANDARD else f"{domain}.{kind}"


def _plain(name: str) -> str:
    return name.removeprefix("ai.onnx.") if name.count(".") == 2 else name
