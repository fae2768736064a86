"""The processes of one training run: one alone, or those that `accelerate launch` started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank, number and device of this process; collective operations that do nothing when it is alone."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[Tensor], loss: Tensor, flag: bool) -> tuple[Tensor, bool]:
        """Replace each gradient by its sum over all processes; return the sum of the losses and of the flags.

        Loss and flag travel with the gradients, so agreeing on them costs no message of their own.
        """
        if self.size == 1:
            return loss, flag
        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        parts = [*(grad.reshape(-1) for grad in grads), torch.stack([loss, torch.full_like(loss, float(flag))])]
        flat = torch.cat(parts)
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, torch.split(flat[:-2], [g.numel() for g in grads]), strict=True):
            parameter.grad = part.view_as(parameter)
        return flat[-2], bool(flat[-1] > 0)

    def from_main(self, value: T) -> T:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        shared: T = broadcast_object_list([value])[0]
        return shared

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value] if self.size == 1 else list(gather_object([value]))

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            PartialState().wait_for_everyone()


def this_process() -> Processes:
    """The process this code runs in, as accelerate sees it."""
    # Without this, accelerate takes processes on a machine without accelerators for strangers to each other.
    only_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=only_cpu)
    return Processes(state.process_index, state.num_processes, state.device)
