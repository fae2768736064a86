"""A device to build for, read from one YAML file: what it runs, what it runs fast, how it is reached.

The schema is in `docs/targets.md`. Files are found in `./targets` and among the shipped ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from edgekd import host
from edgekd.errors import TargetError, unknown

PROBE = "probe"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
KINDS = ("cpu", "gpu", "npu")
SHAPES = ("dynamic", "static")
SPARSITIES = ("2:4", "block", "channel", "unstructured")
REACHES = ("local",)
BUDGETS = ("latency_p95_ms", "speedup", "size_mb", "batch", "sequence")
GRAPH_LEVELS = ("disabled", "basic", "extended", "all")

# Without one of these the CPU has no fused 8-bit dot product, and int8 may be no faster than fp32.
INT8_FEATURES = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"})


@dataclass(frozen=True, kw_only=True)
class Target:
    """One device. `threads` None means every core the process may use.

    A host stands for this target only if its CPU has the features in `requires` and none of those in `excludes`
    (a measurement on a newer CPU would flatter an older one); `features` are those found by `probe`.
    `to_probe` lists the fields the file leaves to `probe`.
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
    unsupported_operators: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    memory_mb: int | None = None
    budget: Mapping[str, float] = field(default_factory=dict)
    reach: str = "local"
    source: str = ""
    features: tuple[str, ...] = ()
    to_probe: tuple[str, ...] = ()
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the place of the file, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if key not in ("path", "to_probe")}

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
    features = host.cpu_features()
    dot_product = bool(features & INT8_FEATURES)
    found: dict[str, Any] = {
        "precisions": ("fp32", "int8"),
        "fast_precisions": ("fp32", "int8") if dot_product else ("fp32",),
        "reduce_range": bool("avx2" in features and not dot_product),
        "memory_mb": host.memory_mb(),
    }
    found = {key: value for key, value in found.items() if key in target.to_probe}
    found["threads"] = target.threads or (host.usable_cores() if target.device == "cpu" else 1)
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
    mistakes += [(len(text.splitlines()), f"missing key {key!r}") for key in REQUIRED if key not in data]
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


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text, got {value!r}")
    return value.strip()


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected a whole number of at least 1, got {value!r}")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected a list of names like [a, b], got {value!r}")
    return tuple(value)


def _one_of(kind: str, choices: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(unknown(kind, str(value), choices))
        return str(value)

    return check


def _some_of(kind: str, choices: tuple[str, ...]) -> Callable[[Any], tuple[str, ...]]:
    check = _one_of(kind, choices)
    return lambda value: tuple(check(item) for item in _names(value))


def _keys_of(kind: str, checks: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], dict[str, Any]]:
    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise TypeError(f"expected `key: value` lines, got {value!r}")
        wrong = [unknown(kind, str(key), checks) for key in value if key not in checks]
        if wrong:
            raise ValueError("; ".join(wrong))
        return {key: checks[key](item) for key, item in value.items()}

    return check


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"expected a number over 0, got {value!r}")
    return float(value)


def _entries(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in (*value, *value.values())):
        raise ValueError(f"expected quoted `key: 'value'` lines, got {value!r}")
    return dict(value)


SESSION_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "graph_optimization": _one_of("graph optimization level", GRAPH_LEVELS),
    "disabled_optimizers": _names,
    "config": _entries,
}

FIELDS: dict[str, Callable[[Any], Any]] = {
    "title": _text,
    "runtime": _text,
    "providers": _names,
    "device": _one_of("device", KINDS),
    "threads": _count,
    "precisions": _some_of("precision", PRECISIONS),
    "fast_precisions": _some_of("precision", PRECISIONS),
    "reduce_range": _flag,
    "shapes": _one_of("kind of shapes", SHAPES),
    "options": _keys_of("session option", SESSION_OPTIONS),
    "sparsity": _some_of("sparsity pattern", SPARSITIES),
    "unsupported_operators": _names,
    "requires": _some_of("CPU feature", tuple(host.FEATURES.values())),
    "excludes": _some_of("CPU feature", tuple(host.FEATURES.values())),
    "memory_mb": _count,
    "budget": _keys_of("budget", {key: _count if key in ("batch", "sequence") else _positive for key in BUDGETS}),
    "reach": _one_of("way to reach a device", REACHES),
    "source": _text,
}
REQUIRED = ("title", "runtime", "device", "precisions", "source")
PROBED = ("precisions", "fast_precisions", "reduce_range", "threads", "memory_mb")
