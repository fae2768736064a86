"""Stage keys: a hash over all that goes into a stage, the stages before it included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.context import Budget
from edgekd.files import sha256_file, sha256_folder, sha256_json
from edgekd.pipeline.setup import Setup
from edgekd.search import Search
from edgekd.stages import Stage
from edgekd.student import local_folder
from edgekd.target import Target

FORMAT = 2
"""Part of every stage key: raise it when a change makes stages of earlier versions unusable."""
FORESEES = ("search",)
"""Stages that look ahead: what the operators stage will make of a shape matters to them."""
TIMES = ("search", "operators")
"""Stages that time models in the form that is expected to ship."""


def root_key(setup: Setup, seed: int) -> str:
    """Where all keys of a run begin: its data, teacher and seed."""
    return sha256_json({"format": FORMAT, **setup.key, "seed": seed})


def target_key(previous: str, setup: Setup, target: Target, budget: Budget) -> str:
    """Where the keys of one target part from those that all targets share; `setup` is fitted to the target."""
    return sha256_json([previous, dict(setup.key), target.fingerprint, dataclasses.asdict(budget)])


def stage_key(previous: str, name: str, stages: Mapping[str, Stage], *, strictness: float, lowering: str) -> str:
    """The key of one stage; only search depends on the strictness, and only `TIMES` on the form expected to ship.

    What the run does with `checkpoint…` settings does not change what comes out, so they are left out.

    Raises:
        StoreError, ModelError: as `contents`.
    """
    parts: list[Any] = [previous, name, settings_of(stages[name]), *contents(stages[name])]
    if name in FORESEES and "operators" in stages:
        parts.append(settings_of(stages["operators"]))
    parts += [lowering] if name in TIMES else []
    parts += [strictness] if name == "search" else []
    return sha256_json(parts)


def contents(stage: Stage) -> list[str | None]:
    """Hashes of the files and folders that the settings of a stage name; None for a latency table that is not there.

    Raises:
        StoreError: one of them cannot be read.
        ModelError: a model is not there.
    """
    if not isinstance(stage, Search):
        return []
    table = Path(stage.table) if stage.table is not None else None
    models = [sha256_folder(local_folder(name)) for name in stage.init]
    return [*([] if table is None else [sha256_file(table) if table.is_file() else None]), *models]


def settings_of(stage: Stage) -> dict[str, Any]:
    """The settings that matter to the result."""
    return {k: v for k, v in dataclasses.asdict(stage).items() if not k.startswith("checkpoint")}
