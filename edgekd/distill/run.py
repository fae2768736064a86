"""The moving parts of one training run, and how they are saved and restored."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekd.distill.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from edgekd.distill.job import Job
from edgekd.distill.optimizer import adamw, clones, copy_into, moments, set_moments
from edgekd.distill.precision import choose_precision
from edgekd.distill.processes import Processes
from edgekd.distill.settings import Training


@dataclass
class State:
    """The counters of a run, as the checkpoint's JSON holds them: `group` groups of `epoch` are done.

    `loss` sums the losses of the `losses` steps since the last evaluation.
    """

    key: str = ""
    step: int = 0
    epoch: int = 0
    group: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    done: bool = False
    loss: float = 0.0
    losses: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Run:
    """Weights, optimizer, average, best weights and counters."""

    def __init__(self, job: Job, settings: Training, processes: Processes, *, seed: int, work: Path) -> None:
        self.job, self.settings, self.processes, self.work = job, settings, processes, work
        job.modules.to(processes.device)
        self.precision = choose_precision(settings.precision, processes.device, job.modules)
        self.parameters = {name: p for name, p in job.modules.named_parameters() if p.requires_grad}
        self.stride = settings.gradient_accumulation * processes.size
        self.total = settings.epochs * -(-len(job.plan(0)) // self.stride)
        self.optimizer = adamw(
            self.parameters, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.shadow = clones(self.parameters) if settings.ema else {}
        self.best: dict[str, Tensor] = {}
        self.state = State(key=self._key(seed))
        self.saved = time.monotonic()

    def _key(self, seed: int) -> str:
        digest = hashlib.sha256(self.job.fingerprint.encode())
        kept = {k: v for k, v in asdict(self.settings).items() if not k.startswith("checkpoint_")}
        digest.update(json.dumps([kept, seed, self.processes.size], sort_keys=True).encode())
        for name, tensor in self.job.modules.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def weights(self) -> dict[str, Tensor]:
        """All that training changes: trained parameters and buffers (running statistics)."""
        kept = self.job.modules.state_dict(keep_vars=True)
        return {n: t.detach() for n, t in kept.items() if n in self.parameters or not isinstance(t, nn.Parameter)}

    def save(self) -> None:
        """Write a checkpoint (main process), with the generators of all processes."""
        generators = self.processes.gather(rng_state(self.processes.device))
        if self.processes.main:
            groups = {
                "weights": self.weights(),
                "moments": moments(self.optimizer, self.parameters),
                "ema": self.shadow,
                "best": self.best,
                "rng": {str(rank): state for rank, state in enumerate(generators)},
            }
            save_checkpoint(self.work, asdict(self.state), groups)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Go on where the checkpoint of this very run ended, if there is one."""
        found = load_checkpoint(self.work, self.state.key)
        if found is None:
            return
        state, groups = found
        self.state = State(**state)
        copy_into(self.weights(), groups["weights"])
        set_moments(self.optimizer, self.parameters, groups.get("moments", {}))
        copy_into(self.shadow, groups.get("ema", {}))
        self.best = {name: t.to(self.processes.device) for name, t in groups.get("best", {}).items()}
        set_rng_state(groups["rng"][str(self.processes.rank)], self.processes.device)

    def due(self) -> bool:
        """Whether this process finds it time for a checkpoint."""
        steps, seconds = self.settings.checkpoint_steps, self.settings.checkpoint_seconds
        by_steps = bool(steps) and (self.state.step + 1) % steps == 0
        return by_steps or (self.processes.main and bool(seconds) and time.monotonic() - self.saved >= seconds)
