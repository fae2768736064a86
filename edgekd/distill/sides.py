"""Two models side by side: how their layers are matched, and which parts of them can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekd.distill.job import Batch
from edgekd.distill.terms import Term
from edgekd.errors import RecipeError
from edgekd.families.compact import kept_tokens

Shape = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]


def even(student: int, teacher: int, sources: Sequence[int]) -> Pairs:
    """Student layer m of M with teacher layer m·L/M, rounded to the nearest, so that last meets last."""
    return tuple((m, (2 * m * teacher + student) // (2 * student)) for m in range(1, student + 1))


def source(student: int, teacher: int, sources: Sequence[int]) -> Pairs:
    """Each student layer with the teacher layer it comes from."""
    if len(sources) != student or max(sources) >= teacher:
        return even(student, teacher, sources)
    return tuple((m + 1, layer + 1) for m, layer in enumerate(sources))


LAYER_MAPS: dict[str, Callable[[int, int, Sequence[int]], Pairs]] = {"even": even, "source": source}


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Two students, the shapes of their hidden states, and how their layers are matched.

    `reduced` are the student's states with fewer tokens than the input, `full` the number of the teacher's that have
    all; `mapped` the pairs of states.
    """

    student: Any
    teacher: Any
    ours: list[Shape]
    theirs: list[Shape]
    reduced: set[int]
    full: int
    mapped: Pairs

    def hidden(self) -> Pairs:
        """The pairs of states that can be compared token by token.

        Raises:
            RecipeError: there is none.
        """
        pairs = tuple(
            (s, t)
            for s, t in self.mapped
            if t < self.full and (s in self.reduced or _tokens(self.ours[s]) == _tokens(self.theirs[t]))
        )
        if not pairs:
            raise RecipeError(
                "hidden losses need layers of equal resolution, and student and teacher share none; "
                "use losses on logits, such as forward_kl"
            )
        return pairs


def look(student: Any, teacher: Any, batch: Batch, layer_map: str) -> Sides:
    """Run both once, to see what they show."""
    ours, theirs = _shapes(student.model, batch), _shapes(teacher.model, batch)
    sources = [layer.source for layer in student.arch.layers]
    return Sides(
        student=student,
        teacher=teacher,
        ours=ours,
        theirs=theirs,
        reduced=_reduced(student.model, len(ours)),
        full=len(theirs) - len(_reduced(teacher.model, len(theirs))),
        mapped=LAYER_MAPS[layer_map](len(ours) - 1, len(theirs) - 1, sources),
    )


def watched(sides: Sides, terms: Sequence[Term]) -> dict[str, Any]:
    """The parts of a wiring that losses on attention and on features of images ask for.

    Raises:
        RecipeError: the two models cannot be compared so; it says what else to use.
    """
    found: dict[str, Any] = {}
    for term in terms:
        name, kind = term.loss.name, term.loss.needs[0]
        if kind == "maps":
            found["maps"] = _maps(name, sides)
        elif kind == "outputs":
            pairs = _outputs(name, sides)
            widths = [(width(sides.ours[s]), width(sides.theirs[t])) for s, t in pairs]
            found |= {"outputs": pairs, "bridges": nn.ModuleList(projector(a, b) for a, b in widths)}
        elif kind == "features":
            pairs = _features(name, sides)
            found |= {"features": pairs, "adapters": nn.ModuleList(_adapter(sides.ours[s]) for s, _ in pairs)}
    return found


def _maps(name: str, sides: Sides) -> Pairs:
    """Layers whose attention maps have equal shapes: all must."""
    for who, model in (("student", sides.student), ("teacher", sides.teacher)):
        if model.family.places is None:
            raise RecipeError(
                f"loss {name!r} needs attention, and a {model.family.name} {who} has none; use feature_affinity"
            )
        if any(layer.shares or layer.tokens for layer in model.arch.layers):
            raise RecipeError(
                f"loss {name!r} needs the attention of all layers over all tokens, and layers of the {who} share it or "
                "drop tokens; use attention_output_mse, which compares the tokens that are left"
            )
    ours, theirs = sides.student.arch.layers, sides.teacher.arch.layers
    if any(ours[s - 1].heads != theirs[t - 1].heads for s, t in sides.mapped):
        raise RecipeError(
            f"loss {name!r} needs equal heads in matched layers, and the student has fewer; use attention_output_mse, "
            "or teacher: student, which compares it with itself before"
        )
    return sides.mapped


def _outputs(name: str, sides: Sides) -> Pairs:
    for who, model in (("student", sides.student), ("teacher", sides.teacher)):
        if model.family.places is None:
            raise RecipeError(
                f"loss {name!r} needs attention, and a {model.family.name} {who} has none; use feature_affinity "
                "or hidden_mse"
            )
    return sides.hidden()


def _features(name: str, sides: Sides) -> Pairs:
    """States of images with as many positions, or (maps) that can be resized."""
    ours, theirs = sides.ours, sides.theirs
    if sides.student.family.places is not None and sides.student.family.places.patches is None:
        raise RecipeError(f"loss {name!r} compares positions of images; for texts use attention_output_mse or minilm")
    if sides.reduced:
        raise RecipeError(
            f"loss {name!r} needs all patches, and layers of the student drop some; use attention_output_mse"
        )
    pairs = tuple((s, t) for s, t in sides.mapped if t < sides.full and len(ours[s]) == len(theirs[t]))
    if not pairs or any(len(ours[s]) == 3 and ours[s][1] != theirs[t][1] for s, t in pairs):
        raise RecipeError(
            f"loss {name!r} needs features of the same kind, and student and teacher see other patches; "
            "use losses on logits, such as forward_kl"
        )
    return pairs


def _adapter(shape: Shape) -> nn.Module:
    """A 1x1 convolution and ReLU, on positions `[B, P, C]`; it starts as the identity.

    ADAPT: the paper does not say how it starts; states of a transformer have no ReLU, as they have signs.
    """
    linear = nn.Linear(width(shape), width(shape))
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.ReLU()) if len(shape) == 4 else linear


def _shapes(model: Any, batch: Batch) -> list[Shape]:
    model.eval()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    return [tuple(state.shape) for state in states]


def _reduced(model: Any, states: int) -> set[int]:
    """Hidden states of the last pass that do not have all tokens: those from some layer on."""
    return {index for index in range(states) if kept_tokens(model, index) is not None}


def _tokens(shape: Shape) -> Shape:
    return shape[2:] if len(shape) == 4 else shape[1:2]


def width(shape: Shape) -> int:
    """Channels of a hidden state."""
    return shape[1] if len(shape) == 4 else shape[-1]


def projector(student: int, teacher: int) -> nn.Module:
    """What brings states of the student's width to the teacher's."""
    return nn.Identity() if student == teacher else nn.Linear(student, teacher)
