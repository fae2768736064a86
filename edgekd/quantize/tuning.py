"""Bits and groups of weights chosen by the metric: neural-compressor's `autotune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgekd.errors import RecipeError, StageError
from edgekd.export.nbits import HEAD_BITS, Grid, canonical, grid_of_module
from edgekd.export.onnx import quiet_export
from edgekd.export.parity import torch_logits
from edgekd.quantize.linear import copied, linear_layers
from edgekd.student import Student

if TYPE_CHECKING:
    from edgekd.context import Context

LADDER = ((4, 128), (4, 64), (4, 32), (8, 0))
"""Bits and group, from the smallest file to the largest: the first that is good enough is taken."""
TUNED = "neural-compressor"
FORMS = {8: "int8_weights", 4: "int4_weights"}


def tune(student: Student, ctx: Context, float_metric: float, tolerance: float) -> tuple[Student, dict[str, Any]]:
    """A copy of the student with the weights that `autotune` settled on, and what `quantization["weights"]` says.

    neural-compressor rounds to the nearest (its RTN, with zero points) and asks for the metric of each try; pooler and
    classifier keep 8 bits throughout. Its integers and scales are taken over as they are.

    Raises:
        RecipeError: the metric of the float model is 0, from which nothing can be taken off.
        StageError: neural-compressor left a layer out, so that nothing would be gained by its choice.
    """
    if float_metric <= 0:
        raise RecipeError("tune: the float model's metric is 0; there is nothing that a smaller file could keep")
    with quiet_export():
        from neural_compressor.torch.quantization import RTNConfig, TuningConfig, autotune

        heads = [name for name in linear_layers(student.model) if _is_head(name)]
        tried = [_config(RTNConfig, bits, group, heads) for bits, group in LADDER]
        tuning = TuningConfig(config_set=tried, tolerable_loss=tolerance / float_metric)
        tuned = autotune(copied(student).model, tuning, eval_fn=lambda model: _metric(model, ctx))
    bits, group = _settled(tuned)
    grid = Grid(bits=bits, group=group, symmetric=bits == HEAD_BITS)
    return _taken_over(student, tuned, grid), {**grid.to_dict(), "method": TUNED}


def _is_head(name: str) -> bool:
    return grid_of_module(Grid(bits=4, group=0), name).bits == HEAD_BITS


def _config(make: Any, bits: int, group: int, heads: list[str]) -> Any:
    # With 8 bits and zero points its own forward pass overflows where a channel is lopsided.
    config = make(bits=bits, group_size=group or -1, use_sym=bits == HEAD_BITS, use_layer_wise=False)
    for name in heads:
        config.set_local(name, make(bits=HEAD_BITS, group_size=-1, use_sym=True, use_layer_wise=False))
    return config


def _metric(model: nn.Module, ctx: Context) -> float:
    labels = ctx.validation.labels
    if labels is None:
        raise RecipeError("tune needs labels on the validation split: it goes by the metric")
    return ctx.task.score(torch_logits(model, ctx.validation), labels)


def _packed(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "INCWeightOnlyLinear"}


def _settled(model: nn.Module) -> tuple[int, int]:
    """Bits and group (0: the whole row) of the layers that are not heads."""
    inner = [module for name, module in _packed(model).items() if not _is_head(name)]
    found = {(each.bits, 0 if each.group_size >= each.in_features else each.group_size) for each in inner}
    if not found:
        raise StageError("neural-compressor quantized none of the model's layers; leave out tune")
    return max(found)


def _taken_over(student: Student, tuned: nn.Module, grid: Grid) -> Student:
    changed = copied(student)
    layers, packed = linear_layers(changed.model), _packed(tuned)
    if missing := sorted(set(layers) - set(packed)):
        raise StageError(f"neural-compressor left {missing[0]} as it was, for its own reasons; leave out tune")
    for name, module in packed.items():
        told = module.unpack()
        own = grid_of_module(grid, name)
        points = torch.repeat_interleave(told.get("zp").int(), module.group_size, dim=1)[:, : module.in_features]
        steps = told.get("int_weight").int() - points
        blocks = canonical(steps.numpy(), told.get("scales").float().numpy(), own)
        layers[name].weight.data.copy_(torch.from_numpy(blocks.values()))
    return changed
