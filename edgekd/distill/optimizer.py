"""AdamW with the groups and the state that a resumable run needs, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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


@torch.no_grad()
def step_with_decay(optimizer: torch.optim.AdamW, decay: Mapping[nn.Parameter, Tensor]) -> None:
    """One step of AdamW in which some parameters are also pulled by `decay`, which stays out of the momentum.

    With `g` the gradient and `d` the decay: `m` averages `g`, `v` averages `(g + d)²`, and the update is
    `(m̂ + d) / (√v̂ + ε)`; the usual one where `d` is not given. Huang et al. 2025 (AST), arXiv:2407.20584.
    """
    pulled: list[tuple[dict[str, Any], nn.Parameter, Tensor]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in decay and parameter.grad is not None:
                pulled.append((group, parameter, parameter.grad))
                parameter.grad = None  # left out by the optimizer's own step
    optimizer.step()
    for group, parameter, gradient in pulled:
        parameter.grad = gradient
        _pull(optimizer, group, parameter, gradient, decay[parameter])


def _pull(
    optimizer: torch.optim.AdamW, group: Mapping[str, Any], parameter: nn.Parameter, gradient: Tensor, decay: Tensor
) -> None:
    state, (fast, slow) = optimizer.state[parameter], group["betas"]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - fast)
    state["exp_avg_sq"].mul_(slow).addcmul_(gradient + decay, gradient + decay, value=1 - slow)
    count = float(state["step"])
    update = (state["exp_avg"] / (1 - fast**count) + decay) / (
        (state["exp_avg_sq"] / (1 - slow**count)).sqrt() + group["eps"]
    )
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


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
