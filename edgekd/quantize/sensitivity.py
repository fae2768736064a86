"""Which layers quantization hurts: one at a time in the real graph, and the fewest that must stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.export.parity import Logits

Unit = tuple[str, ...]
Build = Callable[[Sequence[str]], Path]
"""Writes a form whose named modules stay float."""
EXAMPLES = 64
"""Validation examples that divergences are measured on."""
MOST = 0.5
"""A form with more than this share of its layers in float is given up."""


@dataclass(frozen=True)
class Sensitivity:
    """Layers that read the same tensor, and KL(float ‖ quantized) in nats where they alone are quantized."""

    modules: Unit
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """For the ledger."""
        return {"modules": list(self.modules), "kl": self.kl}


def units(nodes: Mapping[str, Any]) -> list[Unit]:
    """Layers, by module with their nodes, in groups: those that read the same tensor stay float together or not."""
    readers: dict[str, list[str]] = {}
    for module, node in nodes.items():
        readers.setdefault(node.input[0], []).append(module)
    return [tuple(modules) for modules in readers.values()]


def divergence(reference: Logits, other: Logits) -> float:
    """Mean KL(reference ‖ other) of the class probabilities, in nats."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _log_softmax(logits: Logits) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def rank(parts: Sequence[Unit], build: Build, say: Callable[[Path], Logits], reference: Logits) -> list[Sensitivity]:
    """The units by the divergence that each causes alone, the worst first.

    Args:
        parts: all units of the graph.
        build: writes the form with some modules in float.
        say: the logits of a file on the examples.
        reference: the float model's logits on the same.
    """
    everything = [module for unit in parts for module in unit]
    found = []
    for unit in parts:
        file = build([module for module in everything if module not in unit])
        found.append(Sensitivity(unit, divergence(reference, say(file))))
    return sorted(found, key=lambda each: -each.kl)


def fewest(ranked: Sequence[Sensitivity], good: Callable[[Sequence[str]], bool]) -> tuple[str, ...] | None:
    """The modules of the shortest list of worst units with which a form is good; None if half of them do not help."""
    kept: list[str] = []
    for each in ranked[: max(1, int(MOST * len(ranked)))]:
        kept += each.modules
        if good(kept):
            return tuple(kept)
    return None
