"""Where zeros may stand, and which targets profit from them. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgekd.errors import RecipeError, unknown

if TYPE_CHECKING:
    from edgekd.target import Target

PatternName = Literal["auto", "unstructured", "2:4", "4:8", "1:4", "4x1", "16x1", "32x32"]
UNSTRUCTURED = "unstructured"
SPARSITY = 0.75
"""Share of zeros where neither recipe nor pattern says another."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Zeros anywhere, or in order.

    Of every `group` neighbouring inputs of an output `kept` stay (N:M), or blocks of `rows` outputs by `columns` inputs
    stay or go as one. With a `group` of 0 and blocks of one weight, zeros may stand anywhere.
    """

    name: str
    kept: int = 0
    group: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def is_grouped(self) -> bool:
        """Whether it is N:M, so that the share of zeros is given."""
        return self.group > 0

    @property
    def is_blocked(self) -> bool:
        """Whether weights go in blocks."""
        return self.rows * self.columns > 1

    @property
    def sparsity(self) -> float:
        """The share of zeros of an N:M pattern, else the usual one."""
        return 1 - self.kept / self.group if self.group else SPARSITY

    def misfit(self, rows: int, columns: int) -> str:
        """Why a matrix of so many outputs and inputs cannot have the pattern, or an empty string."""
        if self.group and columns % self.group:
            return f"its {columns} inputs are not a multiple of {self.group}"
        if rows % self.rows:
            return f"its {rows} outputs are not a multiple of {self.rows}"
        if columns % self.columns:
            return f"its {columns} inputs are not a multiple of {self.columns}"
        return ""


PATTERNS: dict[str, Pattern] = {
    UNSTRUCTURED: Pattern(name=UNSTRUCTURED),
    "2:4": Pattern(name="2:4", kept=2, group=4),
    "4:8": Pattern(name="4:8", kept=4, group=8),
    "1:4": Pattern(name="1:4", kept=1, group=4),
    "4x1": Pattern(name="4x1", rows=4),
    "16x1": Pattern(name="16x1", rows=16),
    "32x32": Pattern(name="32x32", rows=32, columns=32),
}
"""By the name in a recipe; blocks are outputs x inputs."""

SERVED: dict[str, tuple[str, ...]] = {
    UNSTRUCTURED: tuple(PATTERNS),
    "2:4": ("2:4", "1:4"),
    "block": ("4x1", "16x1", "32x32"),
    "channel": (),
}
"""What a target's `sparsity` serves: what profits from any zeros does from ordered ones too, and 1:4 is 2:4."""


def pattern_named(name: str) -> Pattern:
    """The pattern of a name of `PATTERNS`.

    Raises:
        RecipeError: there is none.
    """
    if name not in PATTERNS:
        raise RecipeError(unknown("pattern", name, PATTERNS))
    return PATTERNS[name]


def pays(name: str, target: Target) -> bool:
    """Whether the target is said to profit from zeros in this pattern."""
    return any(name in SERVED.get(kind, ()) for kind in target.sparsity)


def resolve(name: str, target: Target) -> Pattern:
    """The pattern itself; `auto` is the most orderly one that the target profits from, else zeros anywhere."""
    if name != "auto":
        return pattern_named(name)
    for kind, choice in (("2:4", "2:4"), ("block", "4x1")):
        if kind in target.sparsity:
            return PATTERNS[choice]
    return PATTERNS[UNSTRUCTURED]


def other_share(name: str, sparsity: float | None, target: Target) -> str:
    """Why this share of zeros cannot be had, the pattern having one of its own; or an empty string."""
    pattern = resolve(name, target)
    if not pattern.is_grouped or sparsity in (None, pattern.sparsity):
        return ""
    on = f", which target {target.name} profits from" if name == "auto" else ""
    return (
        f"sparsity must be left out or {pattern.sparsity:g} with the pattern {pattern.name}{on}: it has so many zeros, "
        f"not {sparsity!r}; `pattern: {UNSTRUCTURED}` takes any share"
    )


def remark(name: str, target: Target) -> str:
    """What to say before anything is trained where zeros in this pattern are not known to pay; else nothing."""
    pattern = resolve(name, target)
    if pays(pattern.name, target):
        return ""
    known = [each for each in PATTERNS if pays(each, target)]
    other = f"what pays there: {', '.join(known)}" if known else "no pattern does"
    return (
        f"zeros in the pattern {pattern.name} are not known to pay on target {target.name} ({other}); what is measured "
        "decides whether they stay, and `storage: compressed` counts the bytes of the compressed file"
    )
