"""A finished tiny run, shared by the tests that look at what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekd.latency.bench import Settings
from edgekd.pipeline import Result, compress, finish, sides
from edgekd.recipe import Recipe, load_recipe

STAGES = [
    {"prune": {"layers": [0, 2], "heads": 2, "neurons": [40, 24], "samples": 32}},
    {"distill": {"epochs": 2, "batch_size": 8, "learning_rate": 0.001, "precision": "fp32"}},
    # These models are too small for int8 to gain anything, and the tests are about what ships in int8.
    {"quantize": {"lowering": "int8_dynamic", "force": True}},
]


@pytest.fixture(scope="session")
def make_recipe(make_model: Callable[[str], Path], text_data: Path) -> Callable[..., Recipe]:
    """A function that gives a recipe without search, so that nothing depends on time; keywords change sections."""

    def make(**changes: Any) -> Recipe:
        values = {
            "teacher": str(make_model("bert")),
            "data": {"path": str(text_data)},
            "budget": {"size_mb": 100, "sequence": 16, "threads": 1},
            "stages": STAGES,
        }
        return load_recipe("balanced", values={**values, **changes})

    return make


@pytest.fixture(scope="session", autouse=True)
def _short_looks() -> Iterator[None]:
    """Measure for a moment only: these tests are about what is done with figures, not about the figures."""
    short = Settings(blocks=8, block_ms=2, min_runs=16, warmup_seconds=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "LOOK", short)
        patch.setattr(finish, "CHOICE", short)
        patch.setattr(sides, "LEDGER", short)
        yield


@pytest.fixture(scope="session")
def finished(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return compress(make_recipe(), tmp_path_factory.mktemp("run") / "run")
