"""The keys of a target file and how each is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgekd import host
from edgekd.errors import unknown

PROBE = "probe"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
KINDS = ("cpu", "gpu", "npu")
SHAPES = ("dynamic", "static")
WEIGHTS_ALONE = ("int8_weights", "int4_weights")
"""Forms that store weights in fewer bits and compute as the runtime likes: any precision of a CPU will do."""
SPARSITIES = ("2:4", "block", "channel", "unstructured")
BUDGETS = ("latency_p95_ms", "speedup", "size_mb", "batch", "sequence")
GRAPH_LEVELS = ("disabled", "basic", "extended", "all")
Check = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs or compiles models: the forms they can take for it, and the options a target may give it.

    A form begins with the name of its precision (see `form_precision`). `usual` are the forms, preferred first, for a
    kind of device whose target file names none.
    """

    lowerings: tuple[str, ...]
    usual: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Check] = field(default_factory=dict)


def form_precision(form: str) -> str:
    """`int8_dynamic` -> `int8`; `int16_qdq` has 8-bit weights too, only its activations have 16 bits."""
    return "int8" if form == "int16_qdq" else form.split("_")[0]


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


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected `key: value` lines, got {value!r}")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"expected a list of CPU numbers like [4, 5], got {value!r}")
    if len(set(value)) < len(value):
        raise ValueError(f"expected every CPU once, got {value!r}")
    return tuple(value)


def _by_name(check: Check) -> Check:
    return lambda value: {str(name): check(item) for name, item in _mapping(value).items()}


SESSION_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "graph_optimization": _one_of("graph optimization level", GRAPH_LEVELS),
    "disabled_optimizers": _names,
    "config": _entries,
}

RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        lowerings=(
            "fp32",
            "fp32_fused",
            "fp32_lean",
            "int8_dynamic",
            "int8_dynamic_fused",
            "int8_dynamic_lean",
            "int8_static",
            "int8_static_lean",
            "fp16",
            "fp16_weights",
            "int8_qdq",
            *WEIGHTS_ALONE,
        ),
        usual={
            "cpu": (
                "int8_dynamic_fused",
                "int8_dynamic_lean",
                "int8_static_lean",
                "int8_dynamic",
                "int8_static",
                "fp32_fused",
                "fp32_lean",
                "fp32",
                *WEIGHTS_ALONE,
            ),
            "gpu": ("fp16", "int8_qdq", "fp32_fused", "fp32"),
            "npu": ("int8_qdq", "fp16", "fp32"),
        },
        options={**SESSION_OPTIONS, "provider_options": _by_name(_entries)},
    ),
    "openvino": Runtime(
        lowerings=("fp32", "bf16", "int8_qdq"),
        options={"device": _text, "precision": _one_of("precision", ("f32", "bf16", "f16")), "config": _entries},
    ),
    "qualcomm": Runtime(
        lowerings=("int8_qdq", "int16_qdq"),
        options={"soc": _text, "provider_options": _entries},
    ),
    "ethos-u": Runtime(
        lowerings=("int8_tflite",),
        options=dict.fromkeys(("accelerator", "system_config", "memory_mode", "config", "optimise"), _text),
    ),
}

REACH_OPTIONS: dict[str, dict[str, Check]] = {
    "ssh": {"host": _text, "user": _text, "port": _count, "identity": _text, "known_hosts": _text, "python": _text,
            "folder": _text},
    "adb": {"serial": _text, "python": _text, "folder": _text},
}  # fmt: skip
REACH_REQUIRED = {"ssh": ("host",), "adb": ()}


FACTS = (
    "precisions", "fast_precisions", "reduce_range", "shapes", "options", "sparsity", "lowerings", "symmetric",
    "max_batch", "operators", "unsupported_operators", "cpus", "threads", "board", "requires", "excludes", "memory_mb",
    "budget",
)  # fmt: skip
"""Keys that state a fact of the device; a shipped file says in `sources` where each is from."""


def check_options(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and text of what is wrong between keys: options and lowerings that the runtime does not have."""
    runtime = RUNTIMES.get(values.get("runtime", ""))
    if runtime is None:
        return
    for name in values.get("lowerings", ()):
        if name not in runtime.lowerings:
            yield "lowerings", unknown(f"lowering for {values['runtime']}", name, runtime.lowerings)
    for name in values.get("sources", ()):
        if name not in values and name not in PROBED:
            yield "sources", f"sources: {name!r} is not a key of this file"
    if values.get("providers") == ():
        yield "providers", "providers: expected at least one"
    away = values.get("reach", "local") != "local"
    if away and values["runtime"] in ("qualcomm", "ethos-u"):
        yield "reach", f"reach: {values['runtime']} compiles models here, no device is reached"
    budget = values.get("budget", {})
    if {"latency_p95_ms", "speedup"} <= set(budget):
        yield "budget", "budget: give latency_p95_ms or speedup, not both"
    try:
        _keys_of(f"option of {values['runtime']}", runtime.options)(values.get("options", {}))
    except (TypeError, ValueError) as error:
        yield "options", f"options: {error}"


def _reach(value: Any) -> Any:
    if value == "local":
        return value
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in REACH_OPTIONS:
        raise ValueError(f"expected local, or one of {', '.join(REACH_OPTIONS)} with its settings, got {value!r}")
    [(way, settings)] = value.items()
    checked = _keys_of(f"setting of {way}", REACH_OPTIONS[way])(settings or {})
    for key in REACH_REQUIRED[way]:
        if key not in checked:
            raise ValueError(f"{way} needs {key!r}")
    return {way: checked}


FIELDS: dict[str, Callable[[Any], Any]] = {
    "title": _text,
    "runtime": _one_of("runtime", tuple(RUNTIMES)),
    "providers": _names,
    "device": _one_of("device", KINDS),
    "threads": _count,
    "precisions": _some_of("precision", PRECISIONS),
    "fast_precisions": _some_of("precision", PRECISIONS),
    "reduce_range": _flag,
    "shapes": _one_of("kind of shapes", SHAPES),
    "options": _mapping,
    "sparsity": _some_of("sparsity pattern", SPARSITIES),
    "lowerings": _names,
    "symmetric": _flag,
    "max_batch": _count,
    "operators": _names,
    "unsupported_operators": _names,
    "cpus": _numbers,
    "board": _text,
    "requires": _some_of("CPU feature", tuple(host.FEATURES.values())),
    "excludes": _some_of("CPU feature", tuple(host.FEATURES.values())),
    "memory_mb": _count,
    "budget": _keys_of("budget", {key: _count if key in ("batch", "sequence") else _positive for key in BUDGETS}),
    "reach": _reach,
    "source": _text,
    "sources": _entries,
}
REQUIRED = ("title", "runtime", "device", "precisions", "source")
PROBED = ("precisions", "fast_precisions", "reduce_range", "threads", "memory_mb")
