"""Which hidden state of the student is compared with which of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekd.arch import Layer
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
class Wiring:
    """Indices into `output_hidden_states` for student and teacher, and the modules whose outputs are relations.

    `pairs` are matched layer by layer, of the teacher's those with all tokens alone; where the student's state has
    fewer, the two are compared at these. `last` is the pair whose mean is the embedding. `projectors` brings the
    student's states to the teacher's width where widths differ (training only), one per pair, else `Identity`.
    """

    pairs: Pairs
    last: tuple[int, int] | None
    projectors: nn.ModuleList
    student_qkv: tuple[nn.Module, ...] = ()
    teacher_qkv: tuple[nn.Module, ...] = ()

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Hidden states the student must show."""
        return tuple(sorted({s for s, _ in (*self.pairs, *([self.last] if self.last else ()))}))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Hidden states the teacher must show."""
        return tuple(sorted({t for _, t in (*self.pairs, *([self.last] if self.last else ()))}))


def wire(student: Any, teacher: Any, terms: Sequence[Term], *, batch: Batch, layer_map: str) -> Wiring:
    """Connect two `Student`s for these loss terms; `batch` is any one batch, to see the shapes of hidden states.

    Raises:
        RecipeError: a loss asks for hidden states of equal resolution, or for attention, and there are none.
    """
    needs = {need for term in terms for need in term.loss.needs}
    pairs: Pairs = ()
    last, projectors = None, nn.ModuleList()
    if needs & {"hidden", "embedding"}:
        ours, theirs = _shapes(student.model, batch), _shapes(teacher.model, batch)
        reduced = _reduced(student.model, len(ours))
        full = len(theirs) - len(_reduced(teacher.model, len(theirs)))
        last = (len(ours) - 1, full - 1) if "embedding" in needs else None
        if "hidden" in needs:
            sources = [layer.source for layer in student.arch.layers]
            mapped = LAYER_MAPS[layer_map](len(ours) - 1, len(theirs) - 1, sources)
            pairs = tuple(
                (s, t) for s, t in mapped if t < full and (s in reduced or _tokens(ours[s]) == _tokens(theirs[t]))
            )
            projectors.extend(_projector(_width(ours[s]), _width(theirs[t])) for s, t in pairs)
            if not pairs:
                raise RecipeError(
                    "hidden losses need layers of equal resolution, and student and teacher share none; "
                    "use losses on logits, such as forward_kl"
                )
    student_qkv, teacher_qkv = _both_qkv(student, teacher, terms) if "qkv" in needs else ((), ())
    return Wiring(pairs=pairs, last=last, projectors=projectors, student_qkv=student_qkv, teacher_qkv=teacher_qkv)


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


def _width(shape: Shape) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]


def _projector(student: int, teacher: int) -> nn.Module:
    return nn.Identity() if student == teacher else nn.Linear(student, teacher)


def _both_qkv(student: Any, teacher: Any, terms: Sequence[Term]) -> tuple[tuple[nn.Module, ...], ...]:
    """The modules of the student's last layer, and of the teacher's or the one that a term's `teacher_layer` names."""
    chosen = max(term.settings.get("teacher_layer", 0) for term in terms)
    return _qkv("student", student), _qkv("teacher", teacher, chosen)


def _qkv(name: str, model: Any, chosen: float = 0) -> tuple[nn.Module, ...]:
    """Query, key and value of layer `chosen`, counted from 1, or (0) of the last that computes them for all tokens."""
    if model.family.qkv is None:
        raise RecipeError(f"loss 'minilm' needs attention, and a {model.family.name} {name} has none")
    numbers = _whole_layers(model.arch.layers)
    if chosen and chosen not in numbers:
        raise RecipeError(
            f"teacher_layer of loss 'minilm' is {chosen:g}; layers of the {name} with queries, keys and values of all "
            f"tokens: {', '.join(map(str, numbers))}"
        )
    if not numbers:
        raise RecipeError(f"loss 'minilm' needs a layer of the {name} that computes all tokens, and there is none")
    return tuple(model.family.qkv(model.family.layers(model.model)[int(chosen or numbers[-1]) - 1]))


def _whole_layers(layers: Sequence[Layer]) -> list[int]:
    """Numbers, from 1, of the layers with a query, key and value for every token of the input.

    A layer leaves fewer tokens to those after it, and the one that leaves the first alone has no other query.
    """
    numbers = []
    for number, layer in enumerate(layers, 1):
        if layer.tokens != 1 and not layer.shares:
            numbers.append(number)
        if layer.tokens:
            break
    return numbers
