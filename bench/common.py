"""What the scripts of this folder share: a teacher made on the spot, surroundings of a stage, heads of results."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def require_own_work(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a work folder that was made with other settings: what is in it is taken as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{folder} was made with other settings: choose another --work")
    file.write_text(json.dumps(settings))


def fingerprint(teacher: str) -> str:
    """Tells teachers apart by the contents of their folders."""
    from edgekd.files import sha256_folder

    return sha256_folder(Path(teacher))


def digits_teacher(folder: Path, data: str, *, model: str = "scratch:vit", epochs: int = 18) -> str:
    """A teacher for digits, trained at the first call."""
    from edgekd.context import Silent
    from edgekd.data import DataSpec
    from edgekd.distill.finetune import Finetune, finetune

    if not (folder / "finetune.json").is_file():
        settings = Finetune(epochs=epochs, batch_size=64)
        finetune(model, DataSpec(path=data), folder, settings=settings, seed=0, progress=Silent())
    return str(folder)


def surroundings(teacher: str, data: str, work: Path, cache: Path, **changes: Any) -> tuple[Any, Any]:
    """Setup and context of one student on this machine's CPU: batch 1, 64 tokens, one thread.

    Args:
        teacher: its folder.
        data: where the examples are.
        work: folder of the stage.
        cache: folder of the teacher's outputs, shared between students.
        changes: of the context, such as `seed`, `target` or `budget`.
    """
    from edgekd.context import Budget, Context, Silent
    from edgekd.data import DataSpec
    from edgekd.pipeline.setup import fitted, prepare
    from edgekd.target import load_target, probe

    target = changes.pop("target", None) or probe(load_target("local"))
    budget = changes.pop("budget", Budget(batch=1, sequence=64, threads=1))
    setup = fitted(prepare(teacher, DataSpec(path=data, seed=0), progress=Silent()), target, budget)
    work.mkdir(parents=True, exist_ok=True)
    context = Context(
        teacher=setup.teacher, task=setup.task, processor=setup.processor, train=setup.train,
        validation=setup.validation, test=None, target=target, budget=budget, work=work, cache=cache,
        progress=Silent(), **changes,
    )  # fmt: skip
    return setup, context


def one_thread() -> None:
    """For processes that train beside each other."""
    import torch

    torch.set_num_threads(1)


def head() -> dict[str, Any]:
    """What was run, and where."""
    from edgekd.host import cpu_name, logical_cpus

    words = [f"python bench/{Path(sys.argv[0]).name}", *(Path(word).name for word in sys.argv[1:])]
    return {
        "command": " ".join(words),
        "machine": {"cpu": cpu_name(), "cpus": len(logical_cpus()), "python": platform.python_version()},
    }


def write(name: str, facts: Mapping[str, Any]) -> None:
    """Put figures into the folder of results."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Over seeds; no deviation of one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
