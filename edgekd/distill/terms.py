"""The losses a recipe asks for, with their weights and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekd.distill.losses import LOSSES, Loss
from edgekd.errors import RecipeError, unknown

LossSettings = Mapping[str, float | Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One weighted loss."""

    loss: Loss
    weight: float
    settings: Mapping[str, Any]


def parse_terms(losses: LossSettings) -> tuple[Term, ...]:
    """Read `{name: weight}` or `{name: {weight: …, setting: …}}`; terms of weight 0 are left out.

    Raises:
        RecipeError: names all unknown losses and settings, and values that are not numbers.
    """
    problems = list(_problems(losses))
    if not problems and not any(_weight(value) for value in losses.values()):
        problems = ["no loss has a weight above 0"]
    if problems:
        raise RecipeError("; ".join(problems))
    return tuple(
        Term(loss=LOSSES[name], weight=_weight(value), settings=_settings(value))
        for name, value in losses.items()
        if _weight(value)
    )


def _problems(losses: LossSettings) -> Iterator[str]:
    for name, value in losses.items():
        if name not in LOSSES:
            yield unknown("loss", name, LOSSES)
            continue
        given = value if isinstance(value, Mapping) else {"weight": value}
        allowed = {"weight": 1.0, **LOSSES[name].defaults}
        for key, number in given.items():
            if key not in allowed:
                yield unknown(f"setting of loss {name!r}:", key, allowed)
            elif isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
                yield f"{key} of loss {name!r} must be a number of at least 0, not {number!r}"
            elif key in ("temperature", "smoothing") and number == 0:
                yield f"{key} of loss {name!r} must be above 0"
            elif isinstance(allowed[key], int) and not (isinstance(number, int) and number >= bool(allowed[key])):
                least = int(bool(allowed[key]))
                yield f"{key} of loss {name!r} must be a whole number of at least {least}, not {number!r}"


def _weight(value: float | Mapping[str, float]) -> float:
    return float(value.get("weight", 1.0)) if isinstance(value, Mapping) else float(value)


def _settings(value: float | Mapping[str, float]) -> dict[str, float]:
    return {key: number for key, number in value.items() if key != "weight"} if isinstance(value, Mapping) else {}
