"""Cheaper ways to compute the same layers. Importing this package does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt

from edgekd.errors import RecipeError, unknown
from edgekd.operators.shapes import reshape

if TYPE_CHECKING:
    from edgekd.arch import Arch
    from edgekd.context import Context
    from edgekd.student import Student

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu")
NORMS = ("affine",)

__all__ = ["ACTIVATIONS", "NORMS", "Operators"]


@dataclass(frozen=True, kw_only=True)
class Operators:
    """Change how the layers compute: fewer tokens, cheaper activations and norms, factorised matrices.

    `first_token`: the last layer computes nothing but the first token, which is exact. `tokens`: how many tokens leave
    each layer, in order (0: all); the last number holds for the layers after (PoWER-BERT, Goyal et al. 2020, arXiv
    2001.08950). `share`: how many layers take over the attention of the layer before, those with the most similar maps
    on `samples` training examples first, or which layers (EchoAtt, Rajabzadeh et al. 2024, arXiv 2409.14595).
    `activation`: the inner activation, `norm`: `affine` for a scale and shift per channel instead of LayerNorm
    (MobileBERT, Sun et al. 2020, arXiv 2004.02984). `rank`: the matrices of a layer become products of two thinner ones
    with this many times fewer weights (PELA, Guo et al. 2023, arXiv 2310.10700). Each is built and timed with and
    without, and dropped where neither latency nor size gets better.
    """

    buys: ClassVar[tuple[str, ...]] = ("latency", "size")

    first_token: bool = True
    tokens: list[Annotated[int, Ge(0)]] | None = None
    share: Annotated[int, Ge(0)] | list[Annotated[int, Ge(1)]] | None = None
    activation: str | None = None
    norm: str | None = None
    rank: Annotated[float, Gt(1)] | None = None
    samples: Annotated[int, Ge(1)] = 128
    force: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            RecipeError: unknown names or values out of range.
        """
        for name, value, choices in (("activation", self.activation, ACTIVATIONS), ("norm", self.norm, NORMS)):
            if value is not None and value not in choices:
                raise RecipeError(unknown(name, value, choices))
        if self.tokens is not None:
            _check_tokens(self.tokens)
        if self.rank is not None and not self.rank > 1:
            raise RecipeError(f"rank must be above 1, not {self.rank!r}: it is how many times fewer weights there are")
        if self.samples < 1:
            raise RecipeError(f"samples must be at least 1, not {self.samples!r}")
        shares = self.share if isinstance(self.share, list) else []
        if (isinstance(self.share, int) and self.share < 0) or any(layer < 1 for layer in shares):
            raise RecipeError(f"share must be a count, or indices of layers from 1 on, not {self.share!r}")

    def reshape(self, arch: Arch) -> Arch:
        """The shape with every operator that these settings ask for and that it can have; search predicts this."""
        return reshape(self, arch)

    def possible(self, student: Student) -> Operators:
        """The same settings without what the layers or the head of this student cannot have at all."""
        from edgekd.families.compact import movable

        drop, share = movable(student.model, student.family)
        return replace(
            self,
            first_token=self.first_token and drop,
            tokens=self.tokens if drop else None,
            share=self.share if share else None,
        )

    def run(self, student: Student, ctx: Context) -> Student:
        """Return the student with the operators that pay on the target.

        Raises:
            StageError: an operator that should be exact is not.
        """
        from edgekd.operators.apply import apply_operators

        return apply_operators(self, student, ctx)


def _check_tokens(tokens: list[int]) -> None:
    """Numbers of tokens must fall from layer to layer, after layers that leave all."""
    counts = [count for count in tokens if count]
    if not counts or any(count < 2 for count in counts):
        raise RecipeError(f"tokens must be counts of at least 2, or 0 for all, not {tokens!r}; for one see first_token")
    falling = counts == sorted(counts, reverse=True)
    if not falling or tokens.index(counts[0]) != len(tokens) - len(counts):
        raise RecipeError(f"tokens must not rise from layer to layer, not {tokens!r}; 0 (all) comes first")
