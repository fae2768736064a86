"""Candidates: who proposes shapes under a limit, their scores, and which of them deserve a closer look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from edgekd.arch import Arch
from edgekd.errors import RecipeError
from edgekd.search import Search
from edgekd.search.front import Candidate
from edgekd.search.greedy import depth_chain, importance_widths, stepped, uniform_widths
from edgekd.search.space import Predict, Score, Space, Steps, with_hidden, with_layers
from edgekd.search.variants import Lengths, plain, variant_of, vary
from edgekd.surgery import Importance

SHALLOW = 0.6
"""Depths that use less than this share of the limit at full width are of no use."""
FINEST = 4
"""Neurons are never cut in finer steps than these, unless the recipe says so."""
EVEN = 32
"""Neurons of shapes with equal layers are cut in steps of at most so many, unless the recipe says otherwise."""
NEAR = 0.92
"""Shapes that use less of a limit than this are searched for again in finer steps."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a pool works with: the space and its steps, the proxy, predictions, and importance.

    `lengths` are the tokens of one example. `evolve` looks for shapes under a limit, from some to
    start with; `allocate` gives the shape for some kept layers (None: any) under a limit, None where it cannot.
    """

    space: Space
    steps: Steps
    score: Score
    predict: Predict
    importance: Importance
    lengths: Lengths = field(default_factory=Lengths)
    evolve: Callable[[float, Sequence[Arch]], list[Candidate]] = lambda limit, starts: []
    allocate: Callable[[Sequence[int] | None, float], Arch | None] = lambda kept, limit: None


class Pool:
    """Proposes shapes and remembers the score of every one that was proposed."""

    def __init__(self, settings: Search, means: Means) -> None:
        self.settings, self.means = settings, means
        self.known: dict[Arch, Candidate] = {}
        self._chain: list[tuple[int, ...]] = []
        self._fewest = len(means.space.arch.layers) + 1
        self._evolved = False

    @cached_property
    def strategy(self) -> str:
        """The strategy in use: `auto` looks at everything where that is little.

        Raises:
            RecipeError: everything is asked for, and that is too much.
        """
        size, most = self.means.space.size, self.settings.exhaustive_limit
        if self.settings.strategy == "exhaustive" and size > most:
            raise RecipeError(
                f"there are {size} shapes, and exhaustive_limit is {most}: raise it, take larger head_step and "
                "neuron_step, or choose another strategy"
            )
        return "exhaustive" if self.settings.strategy == "auto" and size <= most else self.settings.strategy

    def under(self, limit: float) -> list[Candidate]:
        """Shapes under a limit (predicted milliseconds), the lowest proxy first."""
        for shape, by in self._proposed(limit):
            self.candidate(shape, by)
        found = [candidate for candidate in self.known.values() if candidate.predicted_ms <= limit]
        return sorted(found, key=lambda candidate: candidate.proxy)

    def ranked(self, limit: float) -> list[Candidate]:
        """Shapes under a limit, the best first: those whose layers could use it up before those that cannot."""
        return sorted(self.under(limit), key=lambda candidate: (not self._able(candidate.arch, limit), candidate.proxy))

    def _able(self, shape: Arch, limit: float) -> bool:
        full = {layer.source: layer for layer in self.means.space.arch.layers}
        widest = replace(shape, layers=tuple(full[layer.source] for layer in shape.layers))
        return self.means.predict(vary(variant_of(shape), widest, self.means.lengths)) >= NEAR * limit

    def candidate(self, shape: Arch, by: str) -> Candidate:
        """A shape with its score."""
        if shape not in self.known:
            score, ms = self.means.score(shape), self.means.predict(shape)
            self.known[shape] = Candidate(arch=shape, proxy=score, predicted_ms=ms, by=by)
        return self.known[shape]

    def field(self, limit: float, count: int) -> list[Candidate]:
        """At most so many shapes for a closer look: the best of every kind first, then the next best.

        Kinds are depths, widths of the residual stream, variants, and whether all layers are alike: the proxy is not
        trusted between them. After the best of all come, of each variant and plain, the deepest with equal layers and
        the best with unequal ones: what is deep and narrow looks worst before training and turns out best after it.
        """
        ranked = self.ranked(limit)
        able = [candidate for candidate in ranked if self._able(candidate.arch, limit)]
        ranked = able or ranked
        best: dict[tuple[int, int, str, bool], Candidate] = {}
        for candidate in ranked:
            arch = candidate.arch
            best.setdefault((len(arch.layers), arch.hidden, variant_of(arch), is_even(arch)), candidate)
        even = sorted((each for each in best.values() if is_even(each.arch)), key=lambda each: -len(each.arch.layers))
        uneven = [each for each in best.values() if not is_even(each.arch)]
        named = [_first(kind, name) for name in self._names() for kind in (even, uneven)]
        chosen = list(dict.fromkeys([*ranked[:1], *(each for each in named if each), *best.values(), *ranked]))
        return sorted(chosen[:count], key=lambda candidate: candidate.proxy)

    def _names(self) -> list[str]:
        """The variants, those that change most first, and the plain shape."""
        return [*reversed(self.settings.variants or ()), ""]

    def fitted(self, shape: Arch, limit: float, avoid: Sequence[Arch] = ()) -> Arch | None:
        """The best shape near another one, with the same layers, that uses up a limit; finer steps where needed.

        Where nothing but shapes to avoid is under the limit: None; where nothing is at all, the narrowest.
        """
        space, steps = self.means.space, self.means.steps
        while True:
            near = list(self._near(shape, limit, space, steps, avoid))
            found = [self.candidate(each, "fitted") for each in near if each not in avoid]
            close = [candidate for candidate in found if candidate.predicted_ms >= NEAR * limit]
            finer = self._finer(steps)
            if close or finer == steps:
                break
            steps = finer
            space = Space.of(
                space.arch,
                space.droppable,
                steps,
                min_layers=space.min_layers,
                hidden=space.hidden,
                order=space.order,
                depths=space.depths,
            )
        if close:
            return min(close, key=lambda candidate: candidate.proxy).arch
        if found:
            return max(found, key=lambda candidate: candidate.predicted_ms).arch
        least = replace(shape, layers=tuple(steps.smallest(layer) for layer in shape.layers))
        return least if not near and least not in avoid else None

    def _finer(self, steps: Steps) -> Steps:
        """Half of the steps, where the recipe does not state them."""
        heads = max(steps.heads // 2, 1) if self.settings.head_step is None else steps.heads
        finest = min(steps.neurons, FINEST)
        neurons = max(steps.neurons // 2, finest) if self.settings.neuron_step is None else steps.neurons
        return replace(steps, heads=heads, neurons=neurons)

    def _even_steps(self) -> Steps:
        """The steps of shapes with equal layers: fine ones, as coarse ones leave a narrow model hardly any choice."""
        heads = 1 if self.settings.head_step is None else self.means.steps.heads
        neurons = min(self.means.steps.neurons, EVEN) if self.settings.neuron_step is None else self.means.steps.neurons
        return replace(self.means.steps, heads=heads, neurons=neurons)

    def _near(self, shape: Arch, limit: float, space: Space, steps: Steps, avoid: Sequence[Arch]) -> Iterator[Arch]:
        name, means = variant_of(shape), self.means
        full = with_hidden(space.arch, shape.hidden)
        sources = {layer.source for layer in shape.layers}
        kept = [i for i, layer in enumerate(full.layers) if layer.source in sources]

        def predict(arch: Arch) -> float:
            return means.predict(vary(name, arch, means.lengths))

        even = uniform_widths(full, kept, limit, predict, self._even_steps(), whole_last=has_whole_last(shape, full))
        options = [even]
        known = even is not None and vary(name, even, means.lengths) in avoid
        # Before training, the proxy would always turn equal layers into unequal ones.
        if even is None or known or not _is_regular(shape, full) or predict(even) < NEAR * limit:
            options += [
                stepped(plain(shape), limit, predict, space, means.importance),
                importance_widths(full, kept, limit, predict, steps, means.importance),
            ]
        yield from (vary(name, option, means.lengths) for option in options if option is not None)

    def _proposed(self, limit: float) -> Iterator[tuple[Arch, str]]:
        if self.strategy == "exhaustive":
            for shape in self.means.space.shapes():
                if self.means.predict(shape) <= limit:
                    yield shape, "exhaustive"
            return
        cheap = list(self._cheap(limit))
        if self.strategy in ("auto", "evolution") and self.settings.trials and not self._evolved:
            for candidate in self.means.evolve(limit, [shape for shape, _ in cheap if not variant_of(shape)]):
                self.known.setdefault(candidate.arch, candidate)
            self._evolved = True
        # A shape proposed to start from belongs to the result of an evolution as well.
        yield from cheap

    def _cheap(self, limit: float) -> Iterator[tuple[Arch, str]]:
        means = self.means
        chain = self._layers(limit)
        shapes = [means.allocate(kept, limit) for kept in (*chain, None)] if self.strategy != "greedy" else []
        fitting = [
            shape
            for shape in shapes
            if shape is not None and means.predict(shape) <= limit and len(shape.layers) >= means.space.min_layers
        ]
        yield from ((shape, "allocate") for shape in fitting)
        if self.strategy == "allocate" and fitting:
            return
        for hidden in means.space.hidden:
            yield from ((shape, "greedy") for shape in self._greedy(chain, hidden, limit, means.predict))
        for name in self.settings.variants or ():
            full = means.space.arch

            def predict(arch: Arch, name: str = name) -> float:
                return means.predict(vary(name, arch, means.lengths))

            for shape in self._greedy(chain, full.hidden, limit, predict):
                if (changed := vary(name, shape, means.lengths)) != shape:
                    yield changed, name

    def _greedy(self, chain: Sequence[tuple[int, ...]], hidden: int, limit: float, predict: Predict) -> Iterator[Arch]:
        means = self.means
        full = with_hidden(means.space.arch, hidden)
        for kept in chain:
            for shape in (
                uniform_widths(full, kept, limit, predict, self._even_steps()),
                uniform_widths(full, kept, limit, predict, self._even_steps(), whole_last=True),
                importance_widths(full, kept, limit, predict, means.steps, means.importance),
            ):
                if shape is not None:
                    yield shape

    def _layers(self, limit: float) -> list[tuple[int, ...]]:
        """Layers to keep at every depth that is of use under the lowest limit asked for so far."""
        space = self.means.space
        fewest = len(space.arch.layers)
        while (
            fewest > space.min_layers and self.means.predict(with_layers(space.arch, range(fewest))) > limit * SHALLOW
        ):
            fewest -= 1
        if fewest < self._fewest:
            self._fewest = fewest
            if space.depths:
                self._chain = [kept for kept in reversed(space.depths) if len(kept) >= fewest]
            else:
                self._chain = depth_chain(space.arch, space.droppable, self.means.score, fewest=fewest)
        return self._chain


def _first(candidates: Sequence[Candidate], name: str) -> Candidate | None:
    return next((candidate for candidate in candidates if variant_of(candidate.arch) == name), None)


def is_even(arch: Arch) -> bool:
    """Whether all layers but the last have the same heads and neurons."""
    return len({(layer.heads, layer.neurons) for layer in arch.layers[:-1]}) <= 1


def _is_regular(arch: Arch, full: Arch) -> bool:
    """Whether the layers are equal, or all but a last one that is as wide as in the full shape."""
    last, other = arch.layers[-1], arch.layers[0]
    same = (last.heads, last.neurons) == (other.heads, other.neurons)
    return is_even(arch) and (same or has_whole_last(arch, full))


def has_whole_last(arch: Arch, full: Arch) -> bool:
    """Whether the last layer is as wide as in the full shape, and not all layers are."""
    widths = {layer.source: (layer.heads, layer.neurons) for layer in full.layers}
    last = arch.layers[-1]
    return (last.heads, last.neurons) == widths[last.source] and any(
        (layer.heads, layer.neurons) != widths[layer.source] for layer in arch.layers
    )
