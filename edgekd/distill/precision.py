"""Which floating-point precision a device computes training steps in."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

# Casting costs a processor more than it saves in layers narrower than this (measured: 64 and 128 lose, 384 gains).
_WIDTH = 256


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, so that autocast makes training faster, not slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def choose_precision(precision: str, device: torch.device, model: nn.Module) -> str:
    """`bf16` or `fp32` for `auto`, the same for the same model and machine."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16(device) and (device.type != "cpu" or _widest(model) >= _WIDTH) else "fp32"


def _widest(model: nn.Module) -> int:
    return max((min(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)), default=0)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass in `bf16` or `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
