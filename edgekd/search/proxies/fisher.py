"""Share of the loss's sensitivity that is cut away, from one pass over the sample with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from edgekd.arch import Arch
from edgekd.search.proxies.activation import held_stream
from edgekd.search.proxies.context import Batch, ProxyContext
from edgekd.surgery.gates import gate_information
from edgekd.surgery.importance import top


def fisher(context: ProxyContext) -> Callable[[Arch], float]:
    """Share of the diagonal Fisher information of the gates on heads and neurons that a shape loses, in [0, 1].

    A gate multiplies the output of one head or neuron and is 1. The square of the loss's first derivative by it,
    summed over examples, estimates what closing it costs (Kwon et al. 2022, arXiv 2204.09656). A dropped layer loses
    all of its gates; of a narrower one those are kept that the importance ranks first, as in a cut. ADAPT: the loss
    is cross-entropy with the labels, as the divergence from the teacher has no slope at the teacher itself, and a
    narrower residual stream multiplies what is kept by `held_stream`. What else a layer may change (`tokens`, `rank`,
    …) is not seen.
    """
    pairs = zip(context.batches, context.labels, strict=True)
    batches = [{**batch, "labels": labels} for batch, labels in pairs]
    information = gate_information(context.student, batches, _losses)
    total = max(sum(float(heads.double().sum() + neurons.double().sum()) for heads, neurons in information), 1e-30)
    importance = context.importance

    def score(arch: Arch) -> float:
        held = 0.0
        for i, layer in context.positions(arch):
            heads, neurons = information[i]
            held += float(neurons[top(importance.neurons[i], layer.neurons)].double().sum())
            if layer.heads:
                held += float(heads[top(importance.heads[i], layer.heads)].double().sum())
        return 1.0 - held / total * held_stream(context, arch)

    return score


def _losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each example, `[B]`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="none")
