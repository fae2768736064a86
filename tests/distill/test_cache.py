"""Laws of the teacher-output cache."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd.context import Silent
from edgekd.distill import Distill
from edgekd.distill.cache import cache_key, cached
from edgekd.distill.teachers import Source, live


class Spoken(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.bars: list[str] = []
        self.lines: list[str] = []

    def start(self, description: str, total: int) -> None:
        self.bars.append(description)

    def say(self, text: str) -> None:
        self.lines.append(text)


def _open(case: Any, hidden: tuple[int, ...], progress: Any = None) -> Source:
    teacher, data = case.ctx.teacher.model, case.ctx.train
    cpu = torch.device("cpu")
    return cached(teacher, data, hidden=hidden, folder=case.ctx.cache, device=cpu, progress=progress or Silent())


@pytest.mark.parametrize("case", ["text", "image", "resnet"])
def test_it_gives_what_the_teacher_gives(case: str, request: Any) -> None:
    found = request.getfixturevalue(case)
    data, hidden = found.ctx.train, (1, 2)
    source, running = _open(found, hidden), live(found.ctx.teacher.model, hidden=hidden)
    for indices in (np.array([3, 1, 7]), np.arange(len(data))[::-1].copy()):
        batch = data.collate(indices)
        ours, theirs = source(indices, batch), running(indices, batch)
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
        assert all(torch.allclose(ours.hidden[i].float(), theirs.hidden[i], atol=5e-3) for i in hidden)


def test_it_is_built_once(text: Any) -> None:
    progress = Spoken()
    for _ in range(2):
        _open(text, (2,), progress)
    assert progress.bars == ["teacher outputs"]


def test_threads_that_want_the_same_wait_for_one_build(text: Any) -> None:
    progress = Spoken()
    threads = [threading.Thread(target=_open, args=(text, (1,), progress)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert progress.bars == ["teacher outputs"]


def test_a_build_that_was_killed_leaves_nothing_that_is_read(text: Any) -> None:
    class Stop(Silent):
        def advance(self, steps: int = 1, **metrics: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _open(text, (1,), Stop())
    assert not [path for path in text.ctx.cache.iterdir() if path.is_dir() and path.suffix != ".partial"]
    _open(text, (1,))
    assert len([path for path in text.ctx.cache.iterdir() if path.is_dir()]) == 1


def test_the_key_tells_teacher_data_and_layers_apart(text: Any) -> None:
    teacher, data = text.ctx.teacher.model, text.ctx.train
    keys = {
        cache_key(teacher, data, (1,)),
        cache_key(teacher, data, (2,)),
        cache_key(text.student.model, data, (1,)),
        cache_key(teacher, data.take(np.arange(5)), (1,)),
    }
    assert len(keys) == 4
    assert cache_key(teacher, replace(data, labels=None), (1,)) in keys


def _say(case: Any, **settings: Any) -> list[str]:
    progress = Spoken()
    Distill(epochs=1, **settings).run(case.student, replace(case.ctx, progress=progress))
    return progress.lines


def test_its_size_is_stated_and_right(text: Any) -> None:
    lines = _say(text, losses={"hidden_mse": 1})
    (folder,) = (path for path in text.ctx.cache.iterdir() if path.is_dir())
    size = sum(file.stat().st_size for file in folder.iterdir())
    stated = float(lines[0].split()[2])
    assert lines[0] == f"teacher outputs: {stated:.1f} MB in {text.ctx.cache}"
    assert stated == pytest.approx(size / 1e6, abs=0.06)


def test_beyond_the_limit_the_teacher_runs_live(text: Any) -> None:
    lines = _say(text, cache_limit_gb=1e-9)
    assert lines[0].startswith("teacher outputs would take 0.0 GB (cache_limit_gb is 1e-09, ")
    assert not text.ctx.cache.exists()


def test_labels_alone_need_no_teacher(text: Any) -> None:
    _say(text, losses={"cross_entropy": 1})
    assert not text.ctx.cache.exists()
    assert not Path(text.ctx.cache).exists()
