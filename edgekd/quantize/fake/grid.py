"""Rounding to integer grids, with gradients that pass straight through; scales as the runtimes derive them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekd.export.nbits import TABLE_GRID

TERNARY_THRESHOLD = 0.7


def weight_limit(bits: int) -> int:
    """The largest integer of a symmetric weight: 127 of 8 bits, 7 of 4."""
    return int(2 ** (bits - 1)) - 1


def grouped(weight: Tensor, group: int) -> Tensor:
    """Rows that share a scale: `[out, …]` -> `[out, in]`, or `[out * groups, group]`, the last group filled with 0."""
    rows = weight.flatten(1)
    if not group:
        return rows
    return F.pad(rows, (0, -rows.shape[1] % group)).reshape(-1, group)


def ungrouped(rows: Tensor, weight: Tensor) -> Tensor:
    """Back from `grouped` rows to the shape of `weight`."""
    flat = weight.flatten(1)
    return rows.reshape(flat.shape[0], -1)[:, : flat.shape[1]].reshape(weight.shape)


def row_scales(rows: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """Scale of each row: the largest magnitude over the largest integer, times `clip`; 1 for a row of zeros."""
    scale = rows.detach().abs().amax(1) / weight_limit(bits)
    return torch.where(scale > 0, scale, torch.ones_like(scale)) * clip


def snap_weight(weight: Tensor, *, bits: int = 8, group: int = 0, clip: Tensor | float = 1.0) -> Tensor:
    """Round weights `[out, …]` to symmetric integers times the scale of their channel or group.

    The largest magnitude of a row becomes the largest integer, so that whoever derives the scale from the result the
    same way, as onnxruntime's `quantize_dynamic` does for 8 bits, finds the same integers again. Zero stays zero.
    """
    rows = grouped(weight, group)
    limit = weight_limit(bits)
    scale = row_scales(rows, bits, clip)
    if not scale.requires_grad:
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return ungrouped(torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, -limit, limit), weight)
    return ungrouped(_round((rows / scale[:, None]).clamp(-limit, limit)) * scale[:, None], weight)


def weight_integers(weight: Tensor, *, bits: int = 8, group: int = 0) -> tuple[Tensor, Tensor]:
    """Integers of a snapped weight, int8 in its shape, and the scale of each row of `grouped`."""
    rows = grouped(weight.detach(), group)
    scale = row_scales(rows, bits)
    return ungrouped((rows / scale[:, None]).round(), weight).to(torch.int8), scale


def best_clip(weight: Tensor, *, bits: int, group: int, steps: int = 20) -> Tensor:
    """The share of each row's largest magnitude, 0.5 to 1, that makes the squared rounding error least `[rows]`."""
    rows = grouped(weight.detach().float(), group)
    best = torch.ones(len(rows), device=rows.device)
    least = torch.full_like(best, torch.inf)
    for step in range(steps + 1):
        clip = 1.0 - 0.5 * step / steps
        error = (snap_weight(rows, bits=bits, clip=clip) - rows).square().sum(1)
        best = torch.where(error < least, clip, best)
        least = torch.minimum(error, least)
    return best


def ternary(weight: Tensor, *, per_row: bool = False) -> Tensor:
    """-a, 0 or a for each weight: 0 where |w| <= 0.7 mean|w|, and a the mean magnitude of the others.

    One a for the matrix, or for each row of a table. Li, Liu 2016, "Ternary Weight Networks", arXiv:1605.04711.
    """
    values = weight.detach()
    sizes = values.abs()
    over = sizes.flatten(1) if per_row else sizes.reshape(1, -1)
    large = over > TERNARY_THRESHOLD * over.mean(1, keepdim=True)
    size = (over * large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp_min(1)
    snapped = (size * large).reshape(weight.shape) * values.sign()
    return straight_through(snapped, weight)


def straight_through(rounded: Tensor, values: Tensor) -> Tensor:
    """`rounded`, to the last bit, with the gradient of `values`."""
    return rounded + (values - values.detach()) if values.requires_grad else rounded


def snap_rows(rows: Tensor, *, bits: int = 8) -> Tensor:
    """Round table rows `[…, D]`: 8 bits or ternary (2) with a scale for every row, 4 with one for 32 values."""
    flat = rows.reshape(-1, rows.shape[-1])
    group = TABLE_GRID.group if bits == TABLE_GRID.bits else 0
    snapped = ternary(flat, per_row=True) if bits == 2 else snap_weight(flat, bits=bits, group=group)
    return snapped.view(rows.shape)


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the largest integer of an activation."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def affine(low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and int32 zero point of ranges, which are widened to hold 0, as DynamicQuantizeLinear derives them."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    least, most = limits(bits, symmetric)
    scale = torch.maximum(-low, high) / most if symmetric else (high - low) / (most - least)
    usable = (scale > 0) & scale.isfinite()
    scale = torch.where(usable, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale) if symmetric else (-low / scale).round().nan_to_num(0.0).clamp(least, most)
    return scale, zero.to(torch.int32)


def quantize_each(inputs: Tensor, low: Tensor, high: Tensor, *, bits: int = 8, symmetric: bool = False) -> Tensor:
    """Round `inputs [B, …]` with a range for each example `[B]`; values beyond it are cut and get no gradient."""
    scale, zero = affine(low, high, bits=bits, symmetric=symmetric)
    return torch.fake_quantize_per_channel_affine(inputs, scale, zero, 0, *limits(bits, symmetric))


def quantize_all(inputs: Tensor, low: Tensor, high: Tensor, *, bits: int = 8, symmetric: bool = False) -> Tensor:
    """Round `inputs` with one range (scalars)."""
    scale, zero = affine(low, high, bits=bits, symmetric=symmetric)
    return torch.fake_quantize_per_tensor_affine(inputs, scale, zero, *limits(bits, symmetric))


def quantize_learned(inputs: Tensor, low: Tensor, high: Tensor, *, bits: int = 8, symmetric: bool = False) -> Tensor:
    """`quantize_all` whose range gets gradients: by the rounding error within it, and by what it cuts off.

    They are scaled by 1/sqrt(N Q), N values of Q steps. Esser et al. 2020, "Learned Step Size Quantization",
    arXiv:1902.08153; with a learned zero point as in Bhalgat et al. 2020, "LSQ+", arXiv:2004.09576.
    """
    least, most = limits(bits, symmetric)
    factor = (inputs.numel() * most) ** -0.5
    low, high = (_scaled_gradient(end, factor) for end in (low.clamp(max=0.0), high.clamp(min=0.0)))
    scale = torch.maximum(-low, high) / most if symmetric else (high - low) / (most - least)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale) if symmetric else _round(-low / scale).clamp(least, most)
    return (_round((inputs / scale + zero).clamp(least, most)) - zero) * scale


def _round(values: Tensor) -> Tensor:
    """Nearest integers with the gradient of the identity."""
    return straight_through(values.detach().round(), values)


def _scaled_gradient(value: Tensor, factor: float) -> Tensor:
    return value * factor + (value - value * factor).detach()
