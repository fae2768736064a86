"""Check the values of a settings dataclass against the bounds and choices in its annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt

from edgekd.errors import unknown


def problems(settings: Any) -> Iterator[str]:
    """Say of each field what is wrong with its value, from `Annotated[int, Ge(1)]`, `Literal[...]` and `| None`."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        yield from _problems(field.name, getattr(settings, field.name), hints[field.name])


def _problems(name: str, value: Any, hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is not None:
            for option in (each for each in arguments if each is not type(None)):
                yield from _problems(name, value, option)
    elif origin is Literal:
        if value not in arguments:
            yield unknown(name, str(value), [str(each) for each in arguments])
    elif origin is Annotated:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield f"{name} must be a number, not {value!r}"
        elif wrong := [words for words, holds in map(_bound, arguments[1:]) if not holds(value)]:
            yield f"{name} must be {' and '.join(wrong)}, not {value!r}"


def _bound(bound: Any) -> tuple[str, Any]:
    match bound:
        case Ge(ge=least):
            return f"at least {least}", lambda value: value >= least
        case Gt(gt=least):
            return f"above {least}", lambda value: value > least
        case Le(le=most):
            return f"at most {most}", lambda value: value <= most
        case Lt(lt=most):
            return f"below {most}", lambda value: value < most
    raise TypeError(f"no rule for {bound!r}")
