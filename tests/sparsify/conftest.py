"""The tiny models of all tests, with a context for one stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec
from edgekd.pipeline.setup import Setup, prepare
from edgekd.target import load_target, probe


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def setup(make_model: Callable[[str], Path], text_data: Path) -> Setup:
    return prepare(str(make_model("bert")), DataSpec(path=str(text_data)), progress=Silent())


@pytest.fixture
def make_ctx(setup: Setup, tmp_path: Path) -> Callable[..., Context]:
    def make(**changes: Any) -> Context:
        values = {
            "teacher": setup.teacher,
            "task": setup.task,
            "processor": setup.processor,
            "train": setup.train.take(np.arange(48)),
            "validation": setup.validation,
            "test": None,
            "target": probe(load_target("local")),
            "budget": Budget(sequence=16, threads=1),
            "work": tmp_path / "work",
            "cache": tmp_path / "cache",
            "progress": Silent(),
        }
        made = Context(**{**values, **changes})
        made.work.mkdir(exist_ok=True)
        return made

    return make


@pytest.fixture
def ctx(make_ctx: Callable[..., Context]) -> Context:
    return make_ctx()
