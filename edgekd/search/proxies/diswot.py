"""DisWOT: how alike student and teacher see a batch when both have random weights.

Dong, Li, Wei 2023, "DisWOT: Student Architecture Search for Distillation WithOut Training", arXiv 2303.15678.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from edgekd.arch import Arch
from edgekd.errors import ModelError
from edgekd.search.proxies.context import Batch, ProxyContext
from edgekd.student import Student
from edgekd.surgery import cut

SEEDS = 3
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

Semantic = Literal["classes", "features"]


def diswot(context: ProxyContext, *, semantic: Semantic = "classes") -> Callable[[Arch], float]:
    """Relation distance plus semantic distance, mean over three seeds, each with a mini-batch of its own.

    Shapes are cut from a random student, so that the full shape of a student that is its teacher has distance 0.
    The teacher's side is computed once for each seed. Three random copies of the student stay in memory.

    Relation: mean squared difference of the Gram matrices `[B, B]`, rows normalized, of the pooled features before
    the classifier (for a convolutional net the paper takes them before pooling: ADAPT). Semantic, of the gradient
    `[K, D]` of the cross-entropy by the classifier's weight: `classes` compares the cosines between the gradients of
    classes, `[K, K]`, which does not depend on D (ADAPT). With two classes they are always -1, so that relations
    alone decide. `features` is the paper's own comparison of `g_k g_kᵀ` `[D, D]`, rows normalized, for equal widths.

    Weights are N(0, 1) as in the paper where batch norm follows. Elsewhere that explodes with depth: N(0, 1/inputs)
    for linear layers and convolutions of a transformer, and N(0, 1) for its tables (ADAPT).

    Raises:
        ModelError: the model has no linear classifier, or `features` is asked of models of different width.
    """
    sides = [_Side.make(context, context.seed + i, semantic) for i in range(SEEDS)]

    @cache
    def score(arch: Arch) -> float:
        return sum(side.distance(cut(side.student, arch, context.importance).model) for side in sides) / len(sides)

    return score


@dataclass(frozen=True)
class _Side:
    """One seed: the batch, the random student to cut, and what the random teacher makes of the batch."""

    student: Student
    batch: Batch
    labels: Tensor
    semantic: Semantic
    relations: Tensor
    gradient: Tensor

    @classmethod
    def make(cls, context: ProxyContext, seed: int, semantic: Semantic) -> _Side:
        batch, labels = _mini_batch(context, seed)
        features, gradient = look(randomized(context.teacher.model, seed), batch, labels)
        student = replace(context.student, model=randomized(context.student.model, seed))
        return cls(student, batch, labels, semantic, relations(features), gradient)

    def distance(self, model: Any) -> float:
        features, gradient = look(model, self.batch, self.labels)
        between = class_distance if self.semantic == "classes" else feature_distance
        apart = (relations(features) - self.relations).square().mean()
        return float(apart + between(gradient, self.gradient))


def _mini_batch(context: ProxyContext, seed: int) -> tuple[Batch, Tensor]:
    """One of the batches with the most classes; another seed begins with another."""
    classes = [len(set(labels.tolist())) for labels in context.labels]
    best = [i for i, count in enumerate(classes) if count == max(classes)]
    chosen = best[int(torch.randint(len(best), (1,), generator=torch.Generator().manual_seed(seed)))]
    batch = {name: value for name, value in context.batches[chosen].items() if name != "labels"}
    return batch, context.labels[chosen]


@torch.no_grad()
def randomized(model: Any, seed: int) -> Any:
    """A copy with random weights, zero biases and neutral norms; equal models get equal weights."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    batch_normed = any(isinstance(module, _BATCH_NORMS) for module in model.modules())
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                table = isinstance(module, nn.Embedding) or name != "weight"
                fan_in = 1 if table or batch_normed else parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name == "bias" else 1.0)
    return model


@torch.no_grad()
def look(model: Any, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features `[B, D]`, and the gradient `[K, D]` of the mean cross-entropy by the classifier's weight.

    Batch norms use the statistics of the batch, as those of random weights are not known beforehand.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS):
            module.train()
    seen: list[Tensor] = []
    handle = classifier(model).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        logits = model(**batch).logits.float()
    finally:
        handle.remove()
    features = seen[-1].float()
    errors = logits.softmax(-1) - one_hot(labels, logits.shape[-1])
    return features, errors.T @ features / len(features)


def classifier(model: Any) -> nn.Linear:
    """The linear layer that gives the logits.

    Raises:
        ModelError: there is none.
    """
    body = {id(module) for module in model.base_model.modules()}
    found = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in body]
    if not found or found[-1].out_features != model.config.num_labels:
        raise ModelError(f"a {model.config.model_type} model without a linear classifier cannot be scored by diswot")
    return found[-1]


def relations(features: Tensor) -> Tensor:
    """Gram matrix of a batch of features `[B, D]`, rows normalized, `[B, B]`."""
    return normalize(features @ features.T, dim=1)


def class_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference between the cosines of the classes' gradients, of any widths: `[K, Ds]`, `[K, Dt]`."""
    ours, theirs = normalize(student, dim=1), normalize(teacher, dim=1)
    return (ours @ ours.T - theirs @ theirs.T).square().mean()


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`Σ_k ‖E_k(student) − E_k(teacher)‖² / (D K)` of gradients `[K, D]`, with `E_k = g_k g_kᵀ`, rows normalized.

    Row i of `E_k` is the unit vector of `g_k` times the sign of its entry i, which gives the sum in closed form.

    Raises:
        ModelError: the widths differ.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"the semantic distance over features needs equal widths, not {student.shape[1]} and {teacher.shape[1]}; "
            "use the one over classes"
        )
    cosines = (normalize(student, dim=1) * normalize(teacher, dim=1)).sum(1)
    agreement = (student.sign() * teacher.sign()).sum(1)
    rows = student.sign().square().sum(1) + teacher.sign().square().sum(1)
    return (rows - 2 * cosines * agreement).sum() / student.numel()
