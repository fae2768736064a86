"""Which hidden state of the student is compared with which of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from edgekd.arch import Layer
from edgekd.distill.job import Batch
from edgekd.distill.sides import Pairs, even, look, projector, source, watched, width
from edgekd.distill.terms import Term
from edgekd.errors import RecipeError

__all__ = ["Pairs", "Wiring", "even", "source", "wire"]


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Indices into `output_hidden_states` for student and teacher, and the modules whose outputs are relations.

    `pairs` are matched layer by layer, of the teacher's those with all tokens alone; where the student's state has
    fewer, the two are compared at these. `last` is the pair whose mean is the embedding. `projectors` brings the
    student's states to the teacher's width where widths differ (training only), one per pair, else `Identity`.
    `entry` says that the outputs of the embeddings are compared too. `maps` and `outputs` are pairs of layers, counted
    from 1, whose attention maps and attention outputs are compared; `features` pairs of states of images. `bridges`
    brings attention outputs to the teacher's width, `adapters` (training only) is what affinities look through.
    """

    pairs: Pairs
    last: tuple[int, int] | None
    projectors: nn.ModuleList
    student_qkv: tuple[nn.Module, ...] = ()
    teacher_qkv: tuple[nn.Module, ...] = ()
    entry: bool = False
    maps: Pairs = ()
    outputs: Pairs = ()
    features: Pairs = ()
    bridges: nn.ModuleList = field(default_factory=nn.ModuleList)
    adapters: nn.ModuleList = field(default_factory=nn.ModuleList)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Hidden states the student must show."""
        return tuple(sorted({s for s, _ in self._states}))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Hidden states the teacher must show."""
        return tuple(sorted({t for _, t in self._states}))

    @property
    def _states(self) -> Pairs:
        return (*self.pairs, *([self.last] if self.last else ()), *([(0, 0)] if self.entry else ()))

    @property
    def watches(self) -> bool:
        """Whether attention or features are compared, by the numbers of layers."""
        return bool(self.maps or self.outputs or self.features)

    @property
    def uncached(self) -> bool:
        """Whether the teacher must run along: what is compared would be too large to keep."""
        return bool(self.teacher_qkv or self.maps or self.features)

    def trained(self) -> dict[str, nn.Module]:
        """What is trained with the student, by name; parts without weights are left out, but for the projectors."""
        parts = {"bridges": self.bridges, "adapters": self.adapters}
        return {"projectors": self.projectors, **{name: part for name, part in parts.items() if len(part)}}

    def of(self, side: Literal["student", "teacher"]) -> dict[str, Any]:
        """What `observe` must look at, of the student or of the teacher."""
        place = ("student", "teacher").index(side)
        watched = {name: getattr(self, name) for name in ("maps", "outputs", "features")}
        return {
            "hidden": getattr(self, f"{side}_layers"),
            "qkv": getattr(self, f"{side}_qkv"),
            **{name: tuple(sorted({pair[place] for pair in pairs})) for name, pairs in watched.items()},
        }


def wire(student: Any, teacher: Any, terms: Sequence[Term], *, batch: Batch, layer_map: str) -> Wiring:
    """Connect two `Student`s for these loss terms; `batch` is any one batch, to see the shapes of hidden states.

    Raises:
        RecipeError: a loss asks for what the two models do not have both, or for more classes than there are.
    """
    classes = student.model.config.num_labels
    for loss in (term.loss for term in terms):
        if classes < loss.classes:
            raise RecipeError(
                f"loss {loss.name!r} has no gradient with fewer than {loss.classes} classes, and there are {classes}: "
                "take forward_kl"
            )
    needs = {need for term in terms for need in term.loss.needs}
    pairs: Pairs = ()
    last, projectors, found = None, nn.ModuleList(), dict[str, Any]()
    if needs & {"hidden", "embedding", "states", "maps", "outputs", "features"}:
        sides = look(student, teacher, batch, layer_map)
        ours, theirs = sides.ours, sides.theirs
        last = (len(ours) - 1, sides.full - 1) if "embedding" in needs else None
        if needs & {"hidden", "states"}:
            pairs = sides.hidden()
            projectors.extend(projector(width(ours[s]), width(theirs[t])) for s, t in pairs)
            found["entry"] = "states" in needs and sides.full > 0 and ours[0] == theirs[0]
        found |= watched(sides, terms)
    student_qkv, teacher_qkv = _both_qkv(student, teacher, terms) if "qkv" in needs else ((), ())
    found |= {"student_qkv": student_qkv, "teacher_qkv": teacher_qkv}
    return Wiring(pairs=pairs, last=last, projectors=projectors, **found)


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
