"""Whether what a recipe names is there, as far as that can be seen without importing anything heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import unknown
from edgekd.schema import At, Mistake
from edgekd.target import list_targets

_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz")


def path_mistakes(raw: Mapping[str, Any]) -> list[Mistake]:
    """Name everything in an unchecked recipe that is not there: teacher, data, targets, task.

    A name that could be one of a hub (`name`, `owner/name`) is left to whoever loads it.
    """
    return [*_teacher(raw), *_data(raw), *_targets(raw), *_task(raw)]


def _teacher(raw: Mapping[str, Any]) -> Iterator[Mistake]:
    name = raw.get("teacher")
    if not isinstance(name, str) or not name:
        return
    folder = Path(name)
    if folder.is_file():
        yield Mistake(("teacher",), f"expected the folder of a model, got the file {name!r}")
    elif folder.is_dir() and not (folder / "config.json").is_file():
        yield Mistake(("teacher",), f"there is no config.json in {name!r}; expected a model folder of transformers")
    elif not folder.exists() and _is_local(name):
        yield Mistake(("teacher",), f"there is no folder {name!r}")


def _data(raw: Mapping[str, Any]) -> Iterator[Mistake]:
    section = raw.get("data")
    if not isinstance(section, Mapping):
        return
    for key in ("path", "unlabeled"):
        name = section.get(key)
        if isinstance(name, str) and name and not Path(name).exists() and _is_local(name):
            at: At = ("data", key)
            yield Mistake(at, f"there is no file or folder {name!r}")


def _targets(raw: Mapping[str, Any]) -> Iterator[Mistake]:
    names = raw.get("targets")
    if not isinstance(names, list):
        return
    known = list_targets()
    for index, name in enumerate(names):
        at: At = ("targets", index)
        if not isinstance(name, str):
            continue
        same = [other for other in names[:index] if isinstance(other, str) and Path(other).stem == Path(name).stem]
        if name in names[:index]:
            yield Mistake(at, f"{name!r} is already in the list")
        elif same:
            yield Mistake(
                at,
                f"{name!r} is a target named {Path(name).stem!r} like {same[0]!r}, so one bundle would overwrite the "
                "other: rename one of the files",
            )
        elif name.endswith((".yaml", ".yml")) or "/" in name:
            if not Path(name).is_file():
                yield Mistake(at, f"there is no target file {name!r}")
        elif name not in known:
            yield Mistake(at, unknown("target", name, known))


def _task(raw: Mapping[str, Any]) -> Iterator[Mistake]:
    from edgekd.tasks import TASKS

    name = raw.get("task")
    if isinstance(name, str) and name not in TASKS:
        yield Mistake(("task",), unknown("task", name, TASKS))


def _is_local(name: str) -> bool:
    """Whether a name can only be meant as a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((*_FILE_ENDINGS, "/"))
