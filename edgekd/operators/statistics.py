"""What samples tell of a model: how alike its attention maps are, what its norms do, what its matrices read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.families.compact import matrices
from edgekd.families.compact_norm import Affine
from edgekd.families.compact_rank import LowRank, factorise
from edgekd.student import Student

Batches = Sequence[Mapping[str, Tensor]]


def attention_similarity(student: Student, batches: Batches) -> list[float]:
    """Mean cosine between the attention rows of each layer and the layer before, head by head: `[L - 1]`.

    -1 where one of the two has no attention over all tokens to compare. Rajabzadeh et al. 2024, "EchoAtt",
    arXiv:2409.14595; ADAPT: compared per head and query, since a head of the later layer reads with the same head.
    """
    layers = student.family.layers(student.model)
    sums = torch.zeros(len(layers) - 1, dtype=torch.float64)
    counts = torch.zeros(len(layers) - 1, dtype=torch.float64)
    for batch in batches:
        mask = batch.get("attention_mask")
        maps = _attention_maps(student, layers, batch)
        for i, (first, second) in enumerate(pairwise(maps)):
            if first is None or second is None or first.shape != second.shape:
                continue
            rows = torch.cosine_similarity(first, second, dim=-1).mean(1)
            real = torch.ones_like(rows) if mask is None else mask.to(rows.dtype)
            sums[i] += float((rows * real).sum())
            counts[i] += float(real.sum())
    return [float(total / count) if count else -1.0 for total, count in zip(sums, counts, strict=True)]


def calibrate_affine(student: Student, batches: Batches) -> None:
    """Fit the scale and shift of each norm to what LayerNorm would do, in place.

    The model runs with LayerNorm, made of the weights that `install` took over, and every channel gets the line
    through its inputs and outputs with the least squared error, so that the means agree. ADAPT: Sun et al. 2020
    (arXiv:2004.02984) train NoNorm from the start.
    """
    norms = {name: module for name, module in student.model.named_modules() if isinstance(module, Affine)}
    found = {name: torch.zeros(4, len(module.weight), dtype=torch.float64) for name, module in norms.items()}
    counts = dict.fromkeys(norms, 0)

    def hook(name: str) -> Callable[..., Tensor]:
        def normalize(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            result = nn.functional.layer_norm(inputs[0], module.weight.shape, module.weight, module.bias)
            x, y = (_valid(part, current).double() for part in (inputs[0], result))
            found[name] += torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)])
            counts[name] += len(x)
            return result

        return normalize

    current: dict[str, Tensor] = {}
    with _hooked([module.register_forward_hook(hook(name)) for name, module in norms.items()]):
        for batch in batches:
            current.clear()
            current.update(batch)
            _run(student.model, batch)
    for name, module in norms.items():
        x, y, xx, xy = found[name] / max(1, counts[name])
        scale = (xy - x * y) / (xx - x * x).clamp_min(1e-12)
        module.weight.data.copy_(scale)
        module.bias.data.copy_(y - scale * x)


def refactorise(student: Student, dense: Student, batches: Batches) -> None:
    """Make the factors of each matrix anew from the whole one in `dense`, weighted by what it reads, in place."""
    family, moments = student.family, _input_moments(dense, batches)
    for index, (layer, whole) in enumerate(zip(family.layers(student.model), family.layers(dense.model), strict=True)):
        for path in _paths(student):
            parent, _, name = path.rpartition(".")
            holder = layer.get_submodule(parent)
            factored, linear = getattr(holder, name, None), getattr(whole.get_submodule(parent), name, None)
            if isinstance(factored, LowRank) and isinstance(linear, nn.Linear):
                setattr(holder, name, factorise(linear, factored.rank, moments[index, path]))


def _paths(student: Student) -> tuple[str, ...]:
    places = student.family.places
    return () if places is None else matrices(places)


def _input_moments(student: Student, batches: Batches) -> dict[tuple[int, str], Tensor]:
    """Means of x xᵀ `[in, in]` over the valid tokens, of what each matrix reads, by layer and path."""
    sums: dict[tuple[int, str], Tensor] = {}
    current: dict[str, Tensor] = {}

    def hook(key: tuple[int, str]) -> Callable[..., None]:
        def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = _valid(inputs[0], current).double()
            sums[key] = sums.get(key, 0.0) + rows.T @ rows

        return add

    handles = []
    for index, layer in enumerate(student.family.layers(student.model)):
        known = dict(layer.named_modules())
        handles += [known[path].register_forward_hook(hook((index, path))) for path in _paths(student) if path in known]
    with _hooked(handles):
        for batch in batches:
            current.clear()
            current.update(batch)
            _run(student.model, batch)
    return sums


def _valid(states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Rows `[n, D]` of states `[B, S, D]` that are no padding; all of them where tokens are missing."""
    mask = batch.get("attention_mask")
    if mask is None or states.shape[1] != mask.shape[1]:
        return states.reshape(-1, states.shape[-1])
    return states[mask.bool()]


def _attention_maps(student: Student, layers: Sequence[nn.Module], batch: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Attention `[B, heads, S, S]` of each layer that has queries and keys of its own."""
    caught: dict[tuple[int, int], Tensor] = {}

    def keep(key: tuple[int, int]) -> Callable[..., None]:
        return lambda module, inputs, output: caught.update({key: output})

    places = student.family.places
    names = () if places is None else tuple(f"{places.attention}.{part}" for part in places.qkv[:2])
    handles = []
    for index, layer in enumerate(layers):
        known = dict(layer.named_modules())
        for part, name in enumerate(names):
            if name in known:
                handles.append(known[name].register_forward_hook(keep((index, part))))
    with _hooked(handles):
        _run(student.model, batch)
    mask = batch.get("attention_mask")
    return [
        _map(caught.get((i, 0)), caught.get((i, 1)), student.family.heads(layer), mask)
        for i, layer in enumerate(layers)
    ]


def _map(query: Tensor | None, key: Tensor | None, heads: int, mask: Tensor | None) -> Tensor | None:
    if query is None or key is None or query.shape != key.shape:
        return None
    if mask is not None and mask.shape[1] != query.shape[1]:
        return None
    first, second = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in (query, key))
    scores = first @ second.transpose(-1, -2) / first.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
    probabilities: Tensor = scores.softmax(-1)
    return probabilities


@torch.no_grad()
def _run(model: Any, batch: Mapping[str, Tensor]) -> None:
    model.eval()(**{name: value for name, value in batch.items() if name != "labels"})


@contextmanager
def _hooked(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
