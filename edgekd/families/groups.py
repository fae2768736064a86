"""Which modules share channels, by torch-pruning's dependency graph (DepGraph, Fang et al. 2023, arXiv 2301.12900)."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from edgekd.errors import ModelError
from edgekd.families.linear import batch_norm, columns, convolution, put


class Member(NamedTuple):
    """A module at `path` that writes the shared channels, or else reads them."""

    path: str
    writes: bool


def members(model: nn.Module, root: nn.Conv2d, inputs: dict[str, torch.Tensor]) -> list[Member]:
    """The modules that must keep the same channels as the output of `root`.

    Args:
        model: any convolutional net; a copy of it is run once.
        root: one of its convolutions.
        inputs: what the model is called with.

    Raises:
        ModelError: some module sees the channels in another order or number, so that one set of them does not do.
    """
    import torch_pruning

    paths = {id(module): path for path, module in model.named_modules()}
    traced = copy.deepcopy(model).float().requires_grad_(True)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(traced, example_inputs=inputs, verbose=False)
    start = traced.get_submodule(paths[id(root)])
    every = list(range(root.out_channels))
    group = graph.get_pruning_group(start, torch_pruning.prune_conv_out_channels, every)
    names = {id(module): path for path, module in traced.named_modules()}
    found = []
    for dependency, indices in group:
        module = dependency.target.module
        if id(module) not in names or not any(True for _ in module.parameters()):
            continue
        if list(indices) != every or not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            raise ModelError(f"edgekd cannot cut the channels that {names[id(module)]} shares: its layout is not known")
        writes = isinstance(module, nn.Conv2d) and graph.is_out_channel_pruning_fn(dependency.handler)
        found.append(Member(names[id(module)], writes))
    return found


def keep_channels(model: nn.Module, shared: list[Member], keep: torch.Tensor) -> None:
    """Keep channels `keep [c]` of the members of a group, in place and in this order."""
    for path, writes in shared:
        module: Any = model.get_submodule(path)
        if isinstance(module, nn.Conv2d):
            put(model, path, convolution(module, out=keep) if writes else convolution(module, into=keep))
        else:
            put(model, path, batch_norm(module, keep) if isinstance(module, nn.BatchNorm2d) else columns(module, keep))


def sources(model: nn.Module, shared: list[Member]) -> list[nn.Module]:
    """The norms through which the channels of a group are written; the convolutions, where there are none."""
    modules = [(model.get_submodule(path), writes) for path, writes in shared]
    norms: list[nn.Module] = [module for module, _ in modules if isinstance(module, nn.BatchNorm2d)]
    return norms or [module for module, writes in modules if writes and isinstance(module, nn.Conv2d)]
