"""AdamW with the groups and the state that a resumable run needs, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
Named = Mapping[str, nn.Parameter]
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def adamw(parameters: Named, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not biases, norms or other vectors."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED_DEVICES for p in parameters.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=fused)


def moments(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, Tensor]:
    """The optimizer's tensors under `moment/parameter name`."""
    return {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in _MOMENTS
        if moment in optimizer.state[parameter]
    }


def set_moments(optimizer: torch.optim.Optimizer, parameters: Named, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `moments` returned."""
    for path, tensor in tensors.items():
        moment, _, name = path.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][moment] = tensor.clone().to(parameter.device)


@torch.no_grad()
def average(shadow: Mapping[str, Tensor], parameters: Named, decay: float) -> None:
    """Move the average towards the weights: shadow = decay * shadow + (1 - decay) * weights."""
    torch._foreach_lerp_(list(shadow.values()), [p.detach() for p in parameters.values()], 1.0 - decay)


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Overwrite tensors by name; names that only one side has are left alone."""
    for name in targets.keys() & sources.keys():
        targets[name].copy_(sources[name])


def clones(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}
