"""Sub-networks that compute with prefixes of a supernet's weights: none is copied, gradients reach the shared ones.

A sub-network is what `surgery.cut` makes of the supernet, with every parameter replaced by a view of the shared one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.arch import Arch
from edgekd.student import Student
from edgekd.surgery import cut
from edgekd.surgery.importance import in_order

KEPT = 64
"""Sub-networks whose modules are kept, without weights, for the next time."""


@dataclass(frozen=True)
class _Tie:
    """One tensor of a sub-network: where it goes, and the shared one that it is a prefix of in every dimension."""

    module: nn.Module
    name: str
    shared: Tensor
    shape: tuple[int, ...]
    buffer: bool

    def renew(self) -> None:
        view = self.shared[tuple(slice(0, size) for size in self.shape)] if self.shape else self.shared
        if self.buffer:
            self.module._buffers[self.name] = view
        else:
            setattr(self.module, self.name, view)


class Slices:
    """The sub-networks of one ordered student; its weights may be trained in place meanwhile."""

    def __init__(self, student: Student) -> None:
        self.student = student
        model = copy.deepcopy(student.model).eval()
        # Convolutional layers are cut in ways that need real weights.
        self.template = replace(student, model=model.to("meta") if student.arch.head_dim else model)
        self.known: OrderedDict[Arch, tuple[Student, list[_Tie]]] = OrderedDict()

    def __call__(self, arch: Arch) -> Student:
        """The sub-network of this shape, in `eval()` mode, with views of the weights as they are now.

        Its tensors are plain attributes, not parameters; it must not be used after the next call with the same shape.
        """
        if arch not in self.known:
            self.known[arch] = self._make(arch)
            if len(self.known) > KEPT:
                self.known.popitem(last=False)
        self.known.move_to_end(arch)
        network, ties = self.known[arch]
        for tie in ties:
            tie.renew()
        return network

    def _make(self, arch: Arch) -> tuple[Student, list[_Tie]]:
        network = cut(self.template, arch, in_order(self.student))
        shared = dict(self.student.model.named_modules())
        ties = []
        for name, module in network.model.named_modules():
            source = shared[self._shared_name(name, network)]
            ties += list(_ties(module, source))
        for tie in ties:
            if not tie.buffer:
                del tie.module._parameters[tie.name]
        network.model.eval()
        return network, ties

    def _shared_name(self, name: str, network: Student) -> str:
        """The path in the supernet of a module of the sub-network, whose layers have other numbers."""
        position = {layer.source: i for i, layer in enumerate(self.student.arch.layers)}
        ours, theirs = _layer_names(network), _layer_names(self.student)
        for path, layer in zip(ours, network.arch.layers, strict=True):
            if name == path or name.startswith(f"{path}."):
                return theirs[position[layer.source]] + name.removeprefix(path)
        return name


def _layer_names(student: Student) -> list[str]:
    names: dict[int, str] = {id(module): name for name, module in student.model.named_modules()}
    return [names[id(layer)] for layer in student.family.layers(student.model)]


def _ties(module: Any, source: Any) -> Iterator[_Tie]:
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield _Tie(module, name, source._parameters[name], tuple(tensor.shape), buffer=False)
    for name, tensor in module._buffers.items():
        if tensor is not None:
            yield _Tie(module, name, source._buffers[name], tuple(tensor.shape), buffer=True)


def draw(low: int, high: int) -> int:
    """A random whole number from low to high, both included, from torch's own generator, which checkpoints keep."""
    return int(torch.randint(low, high + 1, ()))
