"""Check plain data against the fields of dataclasses, and say everything that is wrong with it at once."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, Union

import annotated_types as limits
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from edgekd.errors import nearest

At = tuple[str | int, ...]
"""Where in nested data: keys and list indices from the top."""

REQUIRED = dataclasses.MISSING
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
_WORDS: dict[type, Callable[[Any], str]] = {
    limits.Gt: lambda bound: f"above {bound.gt}",
    limits.Ge: lambda bound: f"of at least {bound.ge}",
    limits.Lt: lambda bound: f"below {bound.lt}",
    limits.Le: lambda bound: f"of at most {bound.le}",
    limits.MinLen: lambda bound: (
        "that is not empty" if bound.min_length == 1 else f"of length {bound.min_length} or more"
    ),
}
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class Mistake(NamedTuple):
    """One thing wrong: where it is, what is wrong, and the line of it where that is not the line of `at`."""

    at: At
    text: str
    line: int | None = None
    key: str | None = None


class Key(NamedTuple):
    """What one key may hold, and what it holds when it is not given (`REQUIRED`: it must be)."""

    hint: Any
    default: Any = REQUIRED


def keys_of(cls: type, bounds: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Key]:
    """The fields of a dataclass as keys, with further bounds (of `annotated_types`) for some."""
    hints = typing.get_type_hints(cls, include_extras=True)
    keys = {}
    for field in (each for each in dataclasses.fields(cls) if each.init):
        hint = hints[field.name]
        if field.name in bounds:
            hint = typing.Annotated[hint, bounds[field.name]]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        keys[field.name] = Key(hint, default)
    return keys


def read(keys: Mapping[str, Key], raw: Any, at: At, mistakes: list[Mistake]) -> dict[str, Any]:
    """Take the values of `keys` out of plain data.

    Every unknown or missing key and every wrong value is added to `mistakes`; what is right is returned, defaults
    filled in.
    """
    if not isinstance(raw, Mapping):
        mistakes.append(Mistake(at, f"expected a mapping with keys {', '.join(sorted(keys))}; got {show(raw)}"))
        return {}
    for name in raw:
        if name not in keys:
            mistakes.append(Mistake(at, f"unknown key {name!r}{_choose(name, keys)}", key=name))
    values = {}
    for name, key in keys.items():
        if name in raw:
            value = _value(key.hint, raw[name], (*at, name), mistakes)
            if value is not REQUIRED:
                values[name] = value
        elif key.default is REQUIRED:
            wanted = "" if key.hint is Any else f": expected {describe(key.hint)}"
            mistakes.append(Mistake(at, f"missing key {name!r}{wanted}"))
        else:
            values[name] = key.default
    return values


def show(value: Any) -> str:
    """A value as it stands in YAML's flow style, shortened to one line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def describe(hint: Any) -> str:
    """What a type allows, in words: `a number above 1`, `one of: cosine, linear`."""
    hint, bounds = _unwrap(hint)
    if isinstance(hint, type) and hint in _NAMES:
        return _bounded(_NAMES[hint], bounds)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of: {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments if each is not type(None))
    if origin in (tuple, list, Collection) or getattr(origin, "__name__", "") == "Sequence":
        name = f"a list, each item {describe(arguments[0])}" if arguments else "a list"
        return _bounded(name, bounds)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping, each value {describe(arguments[1])}"
    return getattr(hint, "__name__", str(hint))


def _value(hint: Any, raw: Any, at: At, mistakes: list[Mistake]) -> Any:
    if hint is Any:
        return raw
    bare, _ = _unwrap(hint)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if isinstance(origin, type) and issubclass(origin, Mapping) and typing.get_origin(arguments[0]) is Literal:
        keys = {name: Key(arguments[1], None) for name in typing.get_args(arguments[0])}
        values = read(keys, {} if raw is None else raw, at, mistakes)
        return {name: value for name, value in values.items() if name in (raw or {})}
    try:
        return _adapter(hint).validate_json(json.dumps(raw))
    except (ValidationError, TypeError, ValueError):
        close = ""
        if isinstance(raw, str):
            close = nearest(raw, [str(each) for each in arguments]) if origin is Literal else ""
        mistakes.append(Mistake(at, f"expected {describe(hint)}, got {show(raw)}{close}"))
        return REQUIRED


def _choose(name: str, keys: Collection[str]) -> str:
    return nearest(name, keys) or f"; choose from: {', '.join(sorted(keys))}"


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=_STRICT)


def _unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """The type without `Annotated` and `| None`, and the bounds that were around it."""
    bounds: list[Any] = []
    while True:
        if typing.get_origin(hint) is typing.Annotated:
            hint, *metadata = typing.get_args(hint)
            for each in metadata:
                bounds += each.metadata if isinstance(each, FieldInfo) else [each]
        elif typing.get_origin(hint) in (Union, types.UnionType):
            rest = [each for each in typing.get_args(hint) if each is not type(None)]
            if len(rest) != 1:
                return hint, bounds
            hint = rest[0]
        else:
            return hint, bounds


def _bounded(name: str, bounds: list[Any]) -> str:
    flat = [part for bound in bounds for part in (bound if isinstance(bound, limits.GroupedMetadata) else [bound])]
    said = [_WORDS[type(part)](part) for part in flat if type(part) in _WORDS]
    return f"{name} {' and '.join(said)}" if said else name
