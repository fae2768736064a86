"""Where the operators of a model ran: shares of each provider, and what did not run where the target wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekd.devices import Operator, is_estimated
from edgekd.target import Target

CPU = "CPU"
CONTAINERS = ("If", "Loop", "Scan")


@dataclass(frozen=True)
class Share:
    """What one provider did: `nodes` per inference, their share of all nodes, and the share of time if it is known."""

    provider: str
    nodes: float
    node_share: float
    time_share: float | None


def shares(operators: Sequence[Operator]) -> tuple[Share, ...]:
    """One line for each provider, the busiest first.

    A subgraph that a provider compiled into one kernel counts as one node.
    """
    nodes = sum(row.calls for row in operators) or 1.0
    found = []
    for provider in dict.fromkeys(row.provider for row in operators):
        own = [row for row in operators if row.provider == provider]
        times = [row.share for row in own if row.share is not None]
        calls = sum(row.calls for row in own)
        found.append(Share(provider, calls, calls / nodes, sum(times) if len(times) == len(own) else None))
    return tuple(sorted(found, key=lambda row: (-(row.time_share or 0.0), -row.nodes)))


def fallbacks(operators: Sequence[Operator], target: Target) -> tuple[Operator, ...]:
    """The operators that do not run where the target wants them.

    That is its first provider; for a compiler or another runtime, the accelerator instead of the CPU.
    """
    if target.runtime == "onnxruntime":
        return tuple(row for row in operators if row.provider != target.providers[0])
    if target.device == "cpu" and not is_estimated(target):
        return ()
    return tuple(row for row in operators if row.provider.upper().startswith(CPU))


def overlaps(operators: Sequence[Operator]) -> tuple[str, ...]:
    """A remark on operators that hold others, whose time is thus counted twice."""
    names = ", ".join(row.type for row in operators if row.type in CONTAINERS and row.ms is not None)
    return (f"the time of {names} contains that of the operators inside, which are listed as well",) if names else ()


def wanted(target: Target) -> str:
    """Where the target wants every operator to run, in words."""
    return target.providers[0] if target.runtime == "onnxruntime" else f"the {target.device.upper()}"


def explain(fallen: Sequence[Operator], place: str) -> str:
    """One sentence that names the operators which do not run on `place`."""
    names = ", ".join(f"{row.type} ×{row.calls:g} on {row.provider}" for row in fallen)
    return f"not all of the model runs on {place}: {names}"
