"""Stage keys: a hash over all that goes into a stage, the stages before it included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from edgekd.context import Budget
from edgekd.files import sha256_json
from edgekd.pipeline.setup import Setup
from edgekd.stages import Stage
from edgekd.target import Target

FORMAT = 2
"""Part of every stage key: raise it when a change makes stages of earlier versions unusable."""
FORESEES = ("supernet", "search", "prune")
"""Stages that look ahead: what the operators stage will make of a shape matters to them."""


def root_key(setup: Setup, seed: int) -> str:
    """Where all keys of a run begin: its data, teacher and seed."""
    return sha256_json({"format": FORMAT, **setup.key, "seed": seed})


def target_key(previous: str, setup: Setup, target: Target, budget: Budget) -> str:
    """Where the keys of one target part from those that all targets share; `setup` is fitted to the target."""
    return sha256_json([previous, dict(setup.key), target.fingerprint, dataclasses.asdict(budget)])


def stage_key(previous: str, name: str, stages: Mapping[str, Stage], *, strictness: float, lowering: str) -> str:
    """The key of one stage; search alone depends on the strictness and on the form that is expected to ship.

    What the run does with `checkpoint…` settings does not change what comes out, so they are left out.
    """
    parts: list[Any] = [previous, name, settings_of(stages[name])]
    if name in FORESEES and "operators" in stages:
        parts.append(settings_of(stages["operators"]))
    if name == "search":
        parts += [strictness, lowering]
    return sha256_json(parts)


def settings_of(stage: Stage) -> dict[str, Any]:
    """The settings that matter to the result."""
    return {k: v for k, v in dataclasses.asdict(stage).items() if not k.startswith("checkpoint")}
