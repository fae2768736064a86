"""What tells one place of measuring from another: a table is gone on with, or taken, only where both are the same."""

from __future__ import annotations

from importlib import metadata

from edgekd.files import sha256_json
from edgekd.target import Target


def fingerprint(target: Target) -> str:
    """Of what in a target file can change a latency; titles, sources and budgets may be rewritten."""
    facts = (target.runtime, dict(target.options), target.providers, target.cpus, target.shapes, target.symmetric)
    # Names of CPUs can be vague ("AMD EPYC"); what it can do is not. Boards and NPUs are not this CPU.
    features = [list(target.features)] if target.features else []
    return sha256_json([*facts, target.reach_by, dict(target.reach_settings), *features])[:16]


def runtime_of(target: Target) -> str:
    """The runtime and, where it is the one installed here, its version (that of a compiler is among its options)."""
    package = {"onnxruntime": "onnxruntime", "openvino": "openvino"}.get(target.runtime)
    if package is None or target.reach_by != "local":
        return target.runtime
    try:
        return f"{target.runtime} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return target.runtime
