"""Scale migration: outlier channels of activations made smaller, and the weights that read them larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from edgekd.families.encoder import Places
from edgekd.quantize.linear import Batch, copied
from edgekd.student import Student

LEAST = 1e-5
Pair = tuple[str, nn.Module, list[nn.Linear]]


def smooth(student: Student, batches: Sequence[Batch], alpha: float) -> tuple[Student, int]:
    """Move scales as SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): s = max|x|^alpha / max|w|^(1 - alpha).

    The float model stays the same function, so only places count where the factor can be put into what comes before:
    a normalization that nothing but the layers reads (pre-norm, as in ViT), and the value projection before the
    attention's output. After the normalization of BERT the residual stream reads the same tensor, and before GELU no
    factor passes: ADAPT, there nothing is moved.

    Returns:
        The changed copy, and how many tensors were scaled; the student itself where there are none.
    """
    changed = copied(student)
    pairs = list(_pairs(changed))
    largest = _largest_inputs(changed.model, pairs, batches)
    with torch.no_grad():
        for name, source, readers in pairs:
            weights = torch.stack([reader.weight.abs().amax(dim=0) for reader in readers]).amax(dim=0)
            scale = largest[name].clamp(min=LEAST) ** alpha / weights.clamp(min=LEAST) ** (1 - alpha)
            scale = torch.where((largest[name] > 0) & (weights > 0), scale, torch.ones_like(scale))
            _divide(source, scale)
            for reader in readers:
                reader.weight *= scale
    return (changed, len(pairs)) if pairs else (student, 0)


def _pairs(student: Student) -> Iterator[Pair]:
    """What makes a tensor, and the linear layers that alone read it."""
    family = student.family
    places = family.places
    if places is None or family.qkv is None:
        return
    for index, layer in enumerate(family.layers(student.model)):
        try:
            value, output = layer.get_submodule(_value(places)), layer.get_submodule(places.attention_output)
        except AttributeError:
            continue
        if isinstance(value, nn.Linear) and isinstance(output, nn.Linear) and value.out_features == output.in_features:
            yield f"{index}.context", value, [output]
        if family.name == "vit":
            yield from _after_norms(layer, index, places)


def _after_norms(layer: nn.Module, index: int, places: Places) -> Iterator[Pair]:
    inner = [f"{places.attention}.{part}" for part in places.qkv]
    for norm, readers in zip(places.norms, (inner, [places.up]), strict=True):
        try:
            found = [layer.get_submodule(path) for path in readers]
            source = layer.get_submodule(norm)
        except AttributeError:
            continue
        linear = [module for module in found if isinstance(module, nn.Linear)]
        if isinstance(source, nn.LayerNorm) and len(linear) == len(found):
            yield f"{index}.{norm}", source, linear


def _value(places: Places) -> str:
    return f"{places.attention}.{places.qkv[2]}"


@torch.no_grad()
def _largest_inputs(model: nn.Module, pairs: Sequence[Pair], batches: Sequence[Batch]) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {name: torch.zeros(readers[0].in_features) for name, _, readers in pairs}
    handles = []
    for name, _, readers in pairs:

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            seen = inputs[0].detach().abs().reshape(-1, inputs[0].shape[-1]).amax(dim=0)
            found[name] = torch.maximum(found[name], seen)

        handles.append(readers[0].register_forward_pre_hook(hook))
    try:
        for batch in batches:
            model.eval()(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return found


def _divide(source: nn.Module, scale: Tensor) -> None:
    weight, bias = source.weight, source.bias
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(source).__name__} has no weight to scale")
    weight /= scale if weight.dim() == 1 else scale[:, None]
    if isinstance(bias, Tensor):
        bias /= scale
