"""Finding what a path or a name stands for, and which splits it has. Nothing is read here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from edgekd.data.builtin import find_builtin
from edgekd.data.files import READERS, file_type, read_file
from edgekd.data.folders import has_images, read_image_folder
from edgekd.data.hub import find_hub
from edgekd.data.idx import find_idx
from edgekd.data.table import Table, concatenate
from edgekd.errors import DataError, unknown

Source = Mapping[str, Callable[[], Table]]

ROLES = ("train", "validation", "test")
ALIASES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
ALIASES |= {"dev": "validation", "test": "test"}

_SHARD = re.compile(r"-\d+-of-\d+$")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
# Files that stand beside data sets and are no rows.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


def find_source(path: str, splits: Mapping[str, str]) -> Source:
    """Role (`train`, `validation`, `test`) to the reader of its rows.

    Args:
        path: see `DataSpec.path`.
        splits: role to a file, folder or split name; roles left out are found by their usual names.

    Raises:
        DataError: nothing is there, it is ambiguous, or a named split does not exist.
    """
    for role in splits:
        if role not in ROLES:
            raise DataError(unknown("split", role, ROLES))
    if not path.strip():
        raise DataError("no data given; name a folder, a file, sklearn:digits or a hub data set")
    if path.startswith("sklearn:"):
        return _assign(path, find_builtin(path), splits, Path())
    local = Path(path).expanduser()
    if local.is_file():
        return _assign(path, {"train": partial(read_file, readable(local))}, splits, local.parent)
    if local.is_dir():
        return _assign(path, find_in_folder(local, splits), splits, local)
    if local.exists():
        raise DataError(f"{path} is neither a folder nor a plain file; write the data into a file first")
    if _looks_local(path, local):
        raise DataError(f"{path} does not exist{nearest_path(local)}; give a data folder, a file or a hub name")
    return _assign(path, find_hub(path, nearest_path(local)), splits, Path())


def find_in_folder(folder: Path, given: Collection[str] = ()) -> Source:
    """Split name to reader, for IDX files, files of rows, or folders of images.

    Args:
        folder: where to look.
        given: roles that are said elsewhere, so that here they may be unclear or absent.

    Raises:
        DataError: nothing is found, or two things claim one split.
    """
    found = find_idx(folder) or _find_tables(folder, given) or _find_image_splits(folder, given)
    if not found and (folder / "data").is_dir():
        return find_in_folder(folder / "data", given)
    if not found and not given:
        kinds = ", ".join(READERS)
        raise DataError(f"{folder} has no data files ({kinds}), IDX files or image folders; check the path")
    return found


def nearest_path(path: Path) -> str:
    """` (did you mean 'x'?)` for a path that is not there, by its nearest neighbour on disk."""
    while not path.parent.is_dir():
        path = path.parent
    close = difflib.get_close_matches(
        path.name, [neighbour.name for neighbour in path.parent.iterdir()], n=1, cutoff=0.5
    )
    return f" (did you mean '{path.parent / close[0]}'?)" if close else ""


def _looks_local(path: str, local: Path) -> bool:
    inside = local.parent != Path() and local.parent.is_dir()
    return inside or bool(file_type(local)) or not _HUB_NAME.fullmatch(path)


def readable(path: Path) -> Path:
    """The path itself.

    Raises:
        DataError: it is not a type of file that can be read.
    """
    if not file_type(path):
        raise DataError(f"{path} is not of a known type; write one of: {', '.join(READERS)}")
    return path


def _assign(path: str, found: Source, splits: Mapping[str, str], folder: Path) -> Source:
    assigned = {role: _named(path, name, found, folder) for role, name in splits.items()}
    for name, reader in found.items():
        role = ALIASES.get(name)
        if role and role not in assigned and name not in splits.values():
            assigned[role] = reader
    if not assigned:
        names = ", ".join(sorted(found))
        raise DataError(f"{path} has no split with a usual name, only {names}; say which is which, e.g. train: NAME")
    return {role: assigned[role] for role in ROLES if role in assigned}


def _named(path: str, name: str, found: Source, folder: Path) -> Callable[[], Table]:
    if name in found:
        return found[name]
    local = folder / Path(name).expanduser()
    if folder != Path() and local.is_file():
        return partial(read_file, readable(local))
    if folder != Path() and local.is_dir():
        return _group_reader(f"{local.name}/", [local]) if _shards(local) else partial(read_image_folder, local)
    raise DataError(f"in {path}: {unknown('split', name, found)}")


def _find_tables(folder: Path, given: Collection[str]) -> Source:
    claims: dict[str, dict[str, list[Path]]] = {}
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        split, group = _claim(path)
        if split in ALIASES:
            claims.setdefault(ALIASES[split], {}).setdefault(group, []).append(path)
        elif group and file_type(path) != ".txt":
            others.append(path)
    _refuse_several(folder, {role: list(groups) for role, groups in claims.items()}, given)
    if claims:
        return {role: _group_reader(*next(iter(groups.items()))) for role, groups in claims.items()}
    if len(others) > 1 and "train" not in given:
        names = ", ".join(path.name for path in others[:8])
        raise DataError(f"{folder} has several files and none is called train: {names}; name them in `splits`")
    return {"train": partial(read_file, others[0])} if len(others) == 1 else {}


def _claim(path: Path) -> tuple[str, str]:
    """(split, group) a path seems to be, shards of one file having one group; two empty strings for none."""
    if path.is_dir():
        return (path.name.lower(), f"{path.name}/") if path.name.lower() in ALIASES and _shards(path) else ("", "")
    if not file_type(path) or path.name in _NOT_ROWS:
        return "", ""
    stem = _SHARD.sub("", Path(path.name.removesuffix(".gz")).stem)
    return stem.lower(), stem + path.name.removeprefix(Path(path.name.removesuffix(".gz")).stem)


def _refuse_several(folder: Path, claims: Mapping[str, Sequence[str]], given: Collection[str]) -> None:
    for role, names in claims.items():
        if len(names) > 1 and role not in given:
            raise DataError(
                f"{folder} has {' and '.join(names)}, all of them for {role}; keep one, or name it in `splits`"
            )


def _group_reader(name: str, paths: Sequence[Path]) -> Callable[[], Table]:
    return partial(_read_shards, name, _shards(paths[0]) if paths[0].is_dir() else paths)


def _read_shards(name: str, paths: Sequence[Path]) -> Table:
    return concatenate([read_file(path) for path in paths], name)


def _shards(folder: Path) -> list[Path]:
    """The files of rows in a split's own folder, all of one type (`cache-*` are leftovers of `datasets`)."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in _NOT_ROWS]
    files = [path for path in files if file_type(path) not in ("", ".txt") and not path.name.startswith("cache-")]
    types = sorted({file_type(path) for path in files})
    if len(types) > 1:
        raise DataError(f"{folder} mixes {' and '.join(types)} files; keep one kind")
    return files


def _find_image_splits(folder: Path, given: Collection[str]) -> Source:
    claims: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.lower() in ALIASES and has_images(path):
            claims.setdefault(ALIASES[path.name.lower()], []).append(path)
    _refuse_several(folder, {role: [f"{path.name}/" for path in paths] for role, paths in claims.items()}, given)
    if claims:
        return {role: partial(read_image_folder, paths[0]) for role, paths in claims.items()}
    return {"train": partial(read_image_folder, folder)} if has_images(folder) else {}
