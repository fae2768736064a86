"""Updating what is left after a cut, in closed form, so that every layer gives what the whole layer would give.

The least-squares update of ZipLM (Kurtić, Frantar & Alistarh 2023, arXiv 2302.04089) and SparseGPT (Frantar & Alistarh
2023, arXiv 2301.00774), on the output matrices of attention and of the feed-forward network, layer after layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgekd.arch import Arch, Layer
from edgekd.families.family import Family
from edgekd.student import Student
from edgekd.surgery.cut import cut
from edgekd.surgery.importance import Importance, in_order
from edgekd.surgery.obs import Moments, factor
from edgekd.surgery.removal import DAMPING, has_bias
from edgekd.surgery.replay import Batch, Stream, features, real, row_weights, watching, weight_of

_Part = tuple[str, nn.Module, nn.Module]


@torch.no_grad()
def reconstruct(student: Student, cut_student: Student, batches: Iterable[Batch], damping: float = DAMPING) -> Student:
    """A copy of the cut student whose attention and feed-forward output matrices, biases included, are fitted anew.

    With `X` what the matrix gets in the cut model (whose layers before are fitted already) on real tokens, and `Y`
    what the uncut layer makes of the same hidden state, the update `Δ` minimises `‖Y - (W + Δ) X‖² + λ‖Δ‖²`, tokens
    weighted by `edgekd.surgery.replay.RowWeights`. So that error never rises on these batches, and where dropped
    inputs are linear in the kept ones it goes to zero with λ. A layer that was not cut stays as it is.

    Args:
        student: the model before the cut.
        cut_student: what was cut from it, with the sources of its layers.
        batches: model inputs.
        damping: λ as a fraction of the mean of the diagonal of `X Xᵀ`.

    Returns:
        The cut student itself where `hindrance` names a reason.
    """
    batches = list(batches)
    if hindrance(student, cut_student) or not batches:
        return cut_student
    family, model = student.family, copy.deepcopy(cut_student.model)
    stream = Stream(model, family, batches)
    for layer, whole in zip(family.layers(model), _originals(student, cut_student), strict=True):
        for name, module, target in _parts(family, layer, whole):
            sums = _missing(family, stream, layer, whole, (name, module, target))
            _update(module, sums, damping)
        stream.advance(layer)
    return replace(cut_student, model=model)


def cut_and_fit(student: Student, shape: Arch, importance: Importance, batches: Iterable[Batch]) -> tuple[Student, str]:
    """Cut to a shape and reconstruct; what hindered that, or an empty string.

    Other operators that the shape asks for are installed on what was fitted, except where layers share attention:
    those keep the same heads, which are chosen for the shape as a whole.
    """
    plain = replace(shape, layers=tuple(Layer(source=x.source, heads=x.heads, neurons=x.neurons) for x in shape.layers))
    widths = shape if any(layer.shares for layer in shape.layers) else plain
    smaller = cut(student, widths, importance)
    reason = hindrance(student, smaller)
    fitted = reconstruct(student, smaller, batches)
    return (fitted if widths == shape else cut(fitted, shape, in_order(fitted))), reason


def hindrance(student: Student, cut_student: Student) -> str:
    """Why a cut student cannot be reconstructed, or an empty string."""
    if cut_student.arch.hidden != student.arch.hidden:
        return "the hidden state was narrowed"
    if not all(layer.plain for layer in (*student.arch.layers, *cut_student.arch.layers)):
        return "layers compute otherwise than the family's own"
    family = student.family
    pairs = zip(family.layers(cut_student.model), _originals(student, cut_student), strict=True)
    matrices = [(module, target) for pair in pairs for _, module, target in _parts(family, *pair)]
    if not all(isinstance(module, nn.Linear | nn.Conv2d) for pair in matrices for module in pair):
        return "its matrices are not plain"
    if any(isinstance(m, nn.Conv2d) and (m.groups > 1 or isinstance(m.padding, str)) for m, _ in matrices):
        return "its convolutions are grouped or padded by name"
    if any(len(weight_of(module)) != len(weight_of(target)) for module, target in matrices):
        return "its channels were narrowed"
    return ""


@torch.no_grad()
def output_errors(student: Student, cut_student: Student, batches: Iterable[Batch]) -> list[float]:
    """For each layer of a cut student, `‖y - ŷ‖² / ‖y‖²` of its output on what it gets in the cut model.

    `y` is what the uncut layer gives for the same hidden state, real tokens only.
    """
    family = student.family
    stream = Stream(cut_student.model, family, list(batches))
    errors = []
    for layer, whole in zip(family.layers(cut_student.model), _originals(student, cut_student), strict=True):
        wrong = total = 0.0
        for call, got, wanted in zip(stream.calls, stream.through(layer), stream.through(whole), strict=True):
            got_rows, wanted_rows = real(got, call.mask).double(), real(wanted, call.mask).double()
            wrong += float((got_rows - wanted_rows).square().sum())
            total += float(wanted_rows.square().sum())
        stream.advance(layer)
        errors.append(wrong / max(total, 1e-300))
    return errors


def _originals(student: Student, cut_student: Student) -> list[nn.Module]:
    """The layers of the uncut student that those of the cut one come from."""
    position = {layer.source: i for i, layer in enumerate(student.arch.layers)}
    layers = student.family.layers(student.model.eval())
    return [layers[position[layer.source]] for layer in cut_student.arch.layers]


def _parts(family: Family, layer: nn.Module, whole: nn.Module) -> list[_Part]:
    """The output matrices of a cut layer and of the whole one, in the order in which they run."""
    parts = [("neurons", family.neuron_input(layer), family.neuron_input(whole))]
    heads, whole_heads = family.head_input(layer), family.head_input(whole)
    return [("heads", heads, whole_heads), *parts] if heads is not None and whole_heads is not None else parts


def _missing(family: Family, stream: Stream, layer: nn.Module, whole: nn.Module, part: _Part) -> Moments:
    """Sums over what a matrix of the cut layer gets, and what is missing in what it gives."""
    (name, module, target), sums = part, Moments()
    with watching(module) as seen, watching(target) as wanted, row_weights(family, whole) as weights:
        for call, _, output in zip(stream.calls, stream.through(layer), stream.through(whole), strict=True):
            missing = real(wanted.output, call.mask) - real(seen.output, call.mask)
            rows = weights.rows(name, call.hidden, output, call.mask)
            sums.add(features(module, seen.input, call.mask), missing, rows)
    return sums


def _update(module: Any, sums: Moments, damping: float) -> None:
    """Fit a matrix, and its bias if it has one, to what is missing."""
    bias = has_bias(module)
    _, lower = factor(sums.gram(centred=bias), damping)
    update = torch.cholesky_solve(sums.cross(centred=bias), lower).T
    module.weight.data += update.reshape(module.weight.shape).float()
    if bias:
        module.bias.data += ((sums.y - update @ sums.x) / sums.count).float()
