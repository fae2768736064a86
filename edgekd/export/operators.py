"""Does a target run what is in a graph? Asked before a device or compiler is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgekd.export.static import free_dimensions
from edgekd.target import Target

STANDARD = ("", "ai.onnx")
ONNXRUNTIME = ((23, "1.23"), (1, "1.22"))
"""The oldest ONNX Runtime that forms were tried with, by version of the standard operators, newest first.

1.22 refuses version 23; 1.23 is the first with a CPU kernel of its Attention.
"""


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


def needs(graph: Any | Path) -> dict[str, Any]:
    """What a runtime must have to load a graph, for the manifest.

    Returns:
        `opset`: version of the standard operators; `domains`: others that are used; `onnxruntime`: the oldest version
        that is known to run it on a CPU; `session_options`: those it needs to be fast. There are none: forms are
        written so that a default session has nothing left to fuse that would be slower.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False) if isinstance(graph, Path) else graph
    opset = next((item.version for item in model.opset_import if item.domain in STANDARD), 1)
    domains = sorted({node.domain for node in _nodes(model.graph)} - set(STANDARD))
    version = next((version for since, version in ONNXRUNTIME if opset >= since), ONNXRUNTIME[-1][1])
    if any(node.op_type == "GatherBlockQuantized" for node in _nodes(model.graph)):
        version = ONNXRUNTIME[0][1]
    return {"opset": opset, "domains": domains, "onnxruntime": f">={version}", "session_options": {}}


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
