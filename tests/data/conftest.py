from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgekd.data import DataSpec, Splits, load_splits

NAMES = {0: "negative", 1: "positive"}


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to `name` below the test's folder; return its path."""

    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    def make(count: int, start: int = 0) -> list[dict[str, Any]]:
        return [{"text": f"text {number}", "label": number % 2} for number in range(start, start + count)]

    return make


@pytest.fixture
def load() -> Callable[..., Splits]:
    def run(path: Path | str, id2label: Mapping[int, str] | None = NAMES, kind: Any = "text", **spec: Any) -> Splits:
        return load_splits(DataSpec(path=str(path), **spec), kind=kind, id2label=id2label)

    return run
