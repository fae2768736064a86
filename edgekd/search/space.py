"""All shapes that a student may have: layers, heads and neurons of each, and the width of the residual stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgekd.arch import Arch, Layer

Predict = Callable[[Arch], float]
Score = Callable[[Arch], float]
Genes = dict[str, int]


def with_layers(arch: Arch, kept: Sequence[int]) -> Arch:
    """The same widths with only the layers at these positions."""
    return replace(arch, layers=tuple(arch.layers[i] for i in kept))


def with_hidden(arch: Arch, hidden: int) -> Arch:
    """The same shape with a narrower residual stream; the stages of a convolutional net shrink in proportion."""
    if hidden == arch.hidden:
        return arch
    channels = [max(round(width * hidden / arch.hidden), 1) for width in arch.channels]
    return replace(arch, hidden=hidden, channels=(*channels[:-1], hidden) if channels else ())


def replace_layer(arch: Arch, position: int, layer: Layer) -> Arch:
    """The same shape with another layer at this position."""
    return replace(arch, layers=(*arch.layers[:position], layer, *arch.layers[position + 1 :]))


@dataclass(frozen=True)
class Steps:
    """The sizes in which heads and neurons are cut, and the least of both by `source`, where that is more than one."""

    heads: int
    neurons: int
    least: tuple[tuple[int, int], ...] = ()

    def least_heads(self, layer: Layer) -> int:
        """One head, where there are any, or as many as must stay."""
        return min(layer.heads, max(self._least(layer)[0], 1))

    def least_neurons(self, layer: Layer) -> int:
        """One step of neurons, or as many as must stay, rounded up to a step."""
        least = -(-self._least(layer)[1] // self.neurons) * self.neurons
        return min(layer.neurons, max(least, self.neurons))

    def _least(self, layer: Layer) -> tuple[int, int]:
        return self.least[layer.source] if layer.source < len(self.least) else (0, 0)

    def fewer_heads(self, layer: Layer) -> int:
        """Heads after one step."""
        return max(layer.heads - self.heads, self.least_heads(layer))

    def fewer_neurons(self, layer: Layer) -> int:
        """Neurons after one step, on a multiple of the step."""
        multiple = (layer.neurons - 1) // self.neurons * self.neurons
        return max(multiple, self.least_neurons(layer))

    def smallest(self, layer: Layer) -> Layer:
        """The layer as narrow as it may be."""
        return replace(layer, heads=self.least_heads(layer), neurons=self.least_neurons(layer))

    def head_counts(self, layer: Layer) -> tuple[int, ...]:
        """All numbers of heads that the layer may have, ascending."""
        return _reached(layer, "heads", self.fewer_heads)

    def neuron_counts(self, layer: Layer) -> tuple[int, ...]:
        """All numbers of neurons that the layer may have, ascending."""
        return _reached(layer, "neurons", self.fewer_neurons)


def _resized(layer: Layer, name: str, value: int) -> Layer:
    return replace(layer, heads=value) if name == "heads" else replace(layer, neurons=value)


def _reached(layer: Layer, name: str, fewer: Callable[[Layer], int]) -> tuple[int, ...]:
    counts = [getattr(layer, name)]
    while (less := fewer(layer)) < counts[-1]:
        counts.append(less)
        layer = _resized(layer, name, less)
    return tuple(reversed(counts))


@dataclass(frozen=True)
class Space:
    """The shapes of one teacher's students.

    `droppable` says which of its layers may go, `heads` and `neurons` which widths each may have, `hidden` which
    widths the residual stream may have (all ascending). `order` are the positions of the layers, the most important
    first: they are put back where too few are kept. `depths` are the positions of the layers to keep for each depth,
    fewest first, where other subsets are of no use (else empty).
    """

    arch: Arch
    droppable: tuple[bool, ...]
    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]
    order: tuple[int, ...]
    min_layers: int = 1
    depths: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        arch: Arch,
        droppable: Sequence[bool],
        steps: Steps,
        *,
        min_layers: int = 1,
        hidden: Sequence[int] = (),
        order: Sequence[int] | None = None,
        depths: Sequence[Sequence[int]] = (),
    ) -> Space:
        """The space of a teacher's shape with widths in these steps; `hidden` without entries leaves that as it is."""
        return cls(
            arch=arch,
            droppable=tuple(droppable),
            heads=tuple(steps.head_counts(layer) for layer in arch.layers),
            neurons=tuple(steps.neuron_counts(layer) for layer in arch.layers),
            hidden=tuple(sorted({*hidden, arch.hidden})),
            order=tuple(order if order is not None else range(len(arch.layers))),
            min_layers=min_layers,
            depths=tuple(tuple(kept) for kept in depths if len(kept) >= min_layers),
        )

    @property
    def size(self) -> int:
        """How many shapes there are."""
        if self.depths:
            return len(self.hidden) * sum(math.prod(self._widths(i) for i in kept) for kept in self.depths)
        fixed, by_depth = 1, [1]
        for drop, heads, neurons in zip(self.droppable, self.heads, self.neurons, strict=True):
            widths = len(heads) * len(neurons)
            if drop:
                by_depth = [a + b * widths for a, b in zip([*by_depth, 0], [0, *by_depth], strict=True)]
            else:
                fixed *= widths
        least = max(self.min_layers - self.droppable.count(False), 0 if False in self.droppable else 1)
        return len(self.hidden) * fixed * sum(by_depth[least:])

    def _widths(self, i: int) -> int:
        return len(self.heads[i]) * len(self.neurons[i])

    def _kept(self) -> Iterator[Sequence[int]]:
        """The positions of every choice of layers, fewest first."""
        if self.depths:
            yield from self.depths
            return
        count = len(self.arch.layers)
        fixed = [i for i in range(count) if not self.droppable[i]]
        spare = [i for i in range(count) if self.droppable[i]]
        least = max(self.min_layers - len(fixed), 0 if fixed else 1)
        for depth in range(least, len(spare) + 1):
            for chosen in itertools.combinations(spare, depth):
                yield sorted([*fixed, *chosen])

    def shapes(self) -> Iterator[Arch]:
        """Every shape once."""
        for kept in self._kept():
            for hidden in self.hidden:
                for widths in itertools.product(*(itertools.product(self.heads[i], self.neurons[i]) for i in kept)):
                    layers = (
                        replace(self.arch.layers[i], heads=heads, neurons=neurons)
                        for i, (heads, neurons) in zip(kept, widths, strict=True)
                    )
                    yield with_hidden(replace(self.arch, layers=tuple(layers)), hidden)

    def genes(self) -> dict[str, int]:
        """Names of the genes and how many values each has; values count from 0. Genes without a choice are left out."""
        found = {"hidden": len(self.hidden), "depth": len(self.depths)}
        for i, drop in enumerate(self.droppable):
            found |= {
                f"keep{i}": 2 if drop and not self.depths else 1,
                f"heads{i}": len(self.heads[i]),
                f"neurons{i}": len(self.neurons[i]),
            }
        return {name: count for name, count in found.items() if count > 1}

    def decode(self, genes: Mapping[str, int]) -> Arch:
        """The shape that genes stand for; genes left out count as their largest value."""
        count = len(self.arch.layers)
        kept = {i for i in range(count) if not self.droppable[i] or genes.get(f"keep{i}", 1)}
        for i in self.order:
            if len(kept) >= min(self.min_layers, count):
                break
            kept.add(i)
        if self.depths:
            kept = set(self.depths[genes.get("depth", len(self.depths) - 1)])
        layers = []
        for i in sorted(kept):
            heads, neurons = self.heads[i], self.neurons[i]
            heads_gene = genes.get(f"heads{i}", len(heads) - 1)
            neurons_gene = genes.get(f"neurons{i}", len(neurons) - 1)
            layers.append(replace(self.arch.layers[i], heads=heads[heads_gene], neurons=neurons[neurons_gene]))
        hidden = self.hidden[genes.get("hidden", len(self.hidden) - 1)]
        return with_hidden(replace(self.arch, layers=tuple(layers)), hidden)

    def encode(self, arch: Arch) -> Genes:
        """The genes of a shape, each width rounded down to one of the space."""
        own = {layer.source: layer for layer in arch.layers}
        depth = _place([len(kept) for kept in self.depths], len(arch.layers))
        values = {"hidden": _place(self.hidden, arch.hidden), "depth": depth}
        for i, full in enumerate(self.arch.layers):
            layer = own.get(full.source)
            values[f"keep{i}"] = int(layer is not None)
            values[f"heads{i}"] = _place(self.heads[i], (layer or full).heads)
            values[f"neurons{i}"] = _place(self.neurons[i], (layer or full).neurons)
        return {name: values[name] for name in self.genes()}

    def smallest(self) -> Arch:
        """As few layers as allowed, each as narrow as allowed."""
        layers = (
            replace(self.arch.layers[i], heads=self.heads[i][0], neurons=self.neurons[i][0])
            for i in next(iter(self._kept()))
        )
        return with_hidden(replace(self.arch, layers=tuple(layers)), self.hidden[0])

    def steps_of(self, arch: Arch) -> Iterator[tuple[Arch, int]]:
        """Shapes with one width of one layer a step wider (`1`) or narrower (`-1`)."""
        position = {layer.source: i for i, layer in enumerate(self.arch.layers)}
        for place, layer in enumerate(arch.layers):
            i = position[layer.source]
            for name, options in (("heads", self.heads[i]), ("neurons", self.neurons[i])):
                value = getattr(layer, name)
                wider = [option for option in options if option > value]
                narrower = [option for option in options if option < value]
                if wider:
                    yield replace_layer(arch, place, _resized(layer, name, wider[0])), 1
                if narrower:
                    yield replace_layer(arch, place, _resized(layer, name, narrower[-1])), -1


def multiples(step: int, full: int, share: float = 0.5) -> tuple[int, ...]:
    """Multiples of a step from `share` of the full width up to it, the full width itself included."""
    return tuple(sorted({*range(math.ceil(full * share / step) * step, full + 1, step), full}))


def _place(options: Sequence[int], value: int) -> int:
    return max(sum(option <= value for option in options) - 1, 0)
