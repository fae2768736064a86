"""A device to build for, read from one YAML file: what it runs, what it runs fast, how it is reached.

The schema is in `docs/targets.md`. Files are found in `./targets` and among the shipped ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from edgekd import host
from edgekd.errors import TargetError, unknown
from edgekd.target_fields import (
    FIELDS,
    PRECISIONS,
    PROBE,
    PROBED,
    REQUIRED,
    RUNTIMES,
    WEIGHTS_ALONE,
    check_options,
    form_precision,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Without one of these the CPU has no fused 8-bit dot product, and int8 may be no faster than fp32.
INT8_FEATURES = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"})


@dataclass(frozen=True, kw_only=True)
class Target:
    """One device. `threads` None means every core the process may use.

    A host stands for this target only if its CPU has the features in `requires` and none of those in `excludes`
    (a measurement on a newer CPU would flatter an older one); `features` are those found by `probe`.
    `to_probe` lists the fields the file leaves to `probe`. `lowerings` are the forms a model may take on it, preferred
    first; `symmetric` says that quantized activations must be centred on zero. `operators`, if any, are all that it
    runs, `unsupported_operators` some that it does not. `max_batch` is the most examples at once. `cpus` are those to
    stay on, `board` what the device tree's `model` or `compatible` has to say for this host to stand for the target.
    `reach` is `local` or `{ssh: {…}}`, `{adb: {…}}`. `sources` says for single keys where their fact comes from,
    `source` for all.
    """

    name: str
    title: str
    runtime: str
    device: str
    precisions: tuple[str, ...]
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    fast_precisions: tuple[str, ...] = ()
    reduce_range: bool = False
    threads: int | None = None
    shapes: str = "dynamic"
    options: Mapping[str, Any] = field(default_factory=dict)
    sparsity: tuple[str, ...] = ()
    lowerings: tuple[str, ...] = ()
    symmetric: bool = False
    max_batch: int | None = None
    operators: tuple[str, ...] = ()
    unsupported_operators: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()
    board: str = ""
    requires: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    memory_mb: int | None = None
    budget: Mapping[str, float] = field(default_factory=dict)
    reach: str | Mapping[str, Mapping[str, Any]] = "local"
    source: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    to_probe: tuple[str, ...] = ()
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the place of the file, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if key not in ("path", "to_probe")}

    @property
    def reach_by(self) -> str:
        """`local`, `ssh` or `adb`."""
        return self.reach if isinstance(self.reach, str) else next(iter(self.reach))

    @property
    def reach_settings(self) -> Mapping[str, Any]:
        """How to reach it, besides the way: host, user, port and so on."""
        return {} if isinstance(self.reach, str) else self.reach[self.reach_by]

    @property
    def forms(self) -> tuple[str, ...]:
        """The lowerings a model may take on it, preferred first: the file's, or the usual ones of its precisions."""
        if self.lowerings:
            return self.lowerings
        runtime = RUNTIMES[self.runtime]
        usual = runtime.usual.get(self.device, runtime.lowerings)
        runs = [form for form in usual if form_precision(form) in self.precisions or form in WEIGHTS_ALONE]
        return tuple(runs) or usual

    @property
    def is_static(self) -> bool:
        """Whether a model's shapes must be fixed before it runs there."""
        return self.shapes == "static"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything the target says."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_target(name_or_path: str | Path) -> Target:
    """Read a target by name or from a YAML file; the fields it leaves open stay open (see `probe`).

    Raises:
        TargetError: there is no such target, or its file has mistakes (all of them in one message).
    """
    path = _find(str(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot read the target file {path}: {error}") from None
    return parse(text, path)


def list_targets() -> list[str]:
    """Names of all targets in `./targets` and among the shipped ones."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def shipped_targets_dir() -> Path:
    """Where the shipped targets are: inside the installed package, else beside it in a checkout."""
    inside = Path(__file__).parent / "_targets"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "targets"


def probe(target: Target) -> Target:
    """Fill the fields the file leaves to probing, and the threads, with what this host is.

    int8 counts as fast where the CPU has a fused 8-bit dot product. With plain AVX2 or AVX-512 it is offered but not
    called fast: 8-bit products pass through 16-bit sums that gain little and saturate, hence `reduce_range`.
    bf16 and fp16 are not offered: ONNX Runtime's CPU provider has no kernels for them on x86 and converts to fp32.
    """
    here = target.reach_by == "local" and target.runtime in ("onnxruntime", "openvino")
    features = host.cpu_features() if here else frozenset()
    dot_product = bool(features & INT8_FEATURES)
    found: dict[str, Any] = {
        "precisions": ("fp32", "int8"),
        "fast_precisions": ("fp32", "int8") if dot_product else ("fp32",),
        "reduce_range": bool("avx2" in features and not dot_product),
        "memory_mb": host.memory_mb(),
    }
    found = {key: value for key, value in found.items() if key in target.to_probe}
    # How many cores a board has is asked when it is reached.
    cores = host.usable_cores() if target.reach_by == "local" else None
    found["threads"] = target.threads or len(target.cpus) or (cores if target.device == "cpu" else 1)
    return replace(target, features=tuple(sorted(features)), to_probe=(), **found)


def parse(text: str, path: Path) -> Target:
    """Check the text of a target file; `path` gives the target its name.

    Raises:
        TargetError: every mistake, each with its line.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TargetError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise TargetError(f"{path}: expected `key: value` lines, got {type(data).__name__}")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    mistakes = [(lines[key], f"the key {key!r} appears twice") for key in _repeated(node)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if problem := _take(str(key), value, values):
            mistakes.append((lines.get(str(key), 1), problem))
    if not NAME.fullmatch(path.stem):
        mistakes.append((1, f"the file's name is the target's: expected letters, digits, - and _, got {path.stem!r}"))
    mistakes += [(len(text.splitlines()), f"missing key {key!r}") for key in REQUIRED if key not in data]
    mistakes += [(lines.get(key, 1), problem) for key, problem in check_options(values)]
    slow = set(values.get("fast_precisions", ())) - set(values.get("precisions", PRECISIONS))
    mistakes += [
        (lines.get("fast_precisions", 1), f"{name} is fast but not among 'precisions'") for name in sorted(slow)
    ]
    if mistakes:
        rows = [f"  line {line}: {problem}" for line, problem in sorted(mistakes)]
        raise TargetError("\n".join([f"{path} has {len(rows)} mistake{'s'[: len(rows) > 1]}:", *rows]))
    to_probe = tuple(key for key, value in data.items() if value == PROBE)
    return Target(name=path.stem, path=path, to_probe=to_probe, **_open(values, to_probe))


def _take(key: str, value: Any, values: dict[str, Any]) -> str:
    """Check one key into `values`; return what is wrong with it, or an empty string."""
    if key not in FIELDS:
        return unknown("key", key, FIELDS)
    if value == PROBE and key in PROBED:
        return ""
    try:
        values[key] = FIELDS[key](value)
    except (TypeError, ValueError) as error:
        return f"{key}: {error}"
    return ""


def _open(values: dict[str, Any], to_probe: tuple[str, ...]) -> dict[str, Any]:
    return {**({"precisions": ("fp32",)} if "precisions" in to_probe else {}), **values}


def _repeated(node: yaml.MappingNode) -> set[str]:
    keys = [str(key.value) for key, _ in node.value]
    return {key for key in keys if keys.count(key) > 1}


def _folders() -> list[Path]:
    return [folder for folder in (Path("targets"), shipped_targets_dir()) if folder.is_dir()]


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise TargetError(f"there is no target file {name}")
        return Path(name)
    for folder in _folders():
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise TargetError(f"{unknown('target', name, list_targets())}; or give the path of a .yaml file")
