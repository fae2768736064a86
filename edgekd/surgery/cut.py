"""Make a model physically smaller: keep the layers, heads and neurons that an `Arch` asks for."""

from __future__ import annotations

import copy

from edgekd.arch import Arch
from edgekd.errors import ModelError
from edgekd.families import arch_of
from edgekd.student import Student
from edgekd.surgery.importance import Importance, top


def cut(student: Student, arch: Arch, importance: Importance) -> Student:
    """Slice a copy of the student down to `arch`; the kept parts are the most important ones, in their order.

    Args:
        student: the model to cut; it is not changed.
        arch: the shape wanted; `source` of its layers refers to the sources of the student's own layers.
        importance: scores of the student's layers.

    Raises:
        ModelError: `arch` asks for a layer the student does not have, or for more heads or neurons than it has.
    """
    position = {layer.source: i for i, layer in enumerate(student.arch.layers)}
    _check(student.arch, arch, position)
    model = copy.deepcopy(student.model)
    family = student.family
    kept = [position[layer.source] for layer in arch.layers]
    family.set_layers(model, kept)
    for layer, index, shape in zip(family.layers(model), kept, arch.layers, strict=True):
        have = student.arch.layers[index]
        if shape.heads < have.heads:
            family.slice_heads(layer, top(importance.heads[index], shape.heads), student.arch.head_dim)
        if shape.neurons < have.neurons:
            family.slice_neurons(layer, top(importance.neurons[index], shape.neurons))
    return Student(
        model=model,
        arch=arch_of(model, tuple(layer.source for layer in arch.layers)),
        processor_dir=student.processor_dir,
        quantization=student.quantization,
    )


def _check(have: Arch, want: Arch, position: dict[int, int]) -> None:
    for layer in want.layers:
        if layer.source not in position:
            raise ModelError(f"the plan keeps layer {layer.source}, but the model has layers {sorted(position)}")
        own = have.layers[position[layer.source]]
        if (
            layer.heads > own.heads
            or layer.neurons > own.neurons
            or layer.neurons < 1
            or (own.heads and not layer.heads)
        ):
            raise ModelError(
                f"layer {layer.source} has {own.heads} heads and {own.neurons} neurons; "
                f"the plan asks for {layer.heads} and {layer.neurons}"
            )
    sources = [layer.source for layer in want.layers]
    if sources != sorted(set(sources)) or not sources:
        raise ModelError(f"the plan must keep at least one layer, each once and in order, not {sources}")
