"""Divergence of the cut, untrained student's answers from the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch.nn import functional

from edgekd.arch import Arch
from edgekd.search.proxies.context import ProxyContext, run
from edgekd.surgery import cut


def kl(context: ProxyContext) -> Callable[[Arch], float]:
    """`KL(teacher ‖ cut student)` in nats, mean over the sample. One pass over the sample for each shape."""
    targets = [logits.log_softmax(-1) for logits in run(context.teacher.model, context.batches)]

    @cache
    def score(arch: Arch) -> float:
        model = cut(context.student, arch, context.importance).model
        total, rows = 0.0, 0
        for logits, target in zip(run(model, context.batches), targets, strict=True):
            total += float(functional.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True))
            rows += len(target)
        return total / rows

    return score
