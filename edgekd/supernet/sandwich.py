"""Train all sub-networks of one model together, by the sandwich rule, with the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.arch import Arch
from edgekd.context import Silent
from edgekd.distill.adjust import frozen
from edgekd.distill.job import Batch, Job, describe
from edgekd.distill.loop import train
from edgekd.distill.objective import Objective
from edgekd.distill.precision import choose_precision
from edgekd.distill.processes import this_process
from edgekd.distill.recover import (
    evaluator,
    first_batch,
    freezes_embeddings,
    job_fingerprint,
    known_labels,
    loop_settings,
    teacher_source,
    without_labels,
)
from edgekd.distill.signals import Signals
from edgekd.distill.teachers import Source
from edgekd.distill.terms import Term, parse_terms
from edgekd.distill.wiring import Pairs, Wiring, source, wire
from edgekd.errors import RecipeError
from edgekd.supernet.rewire import rewire
from edgekd.supernet.slices import Slices, draw
from edgekd.supernet.space import Space, kept_layers
from edgekd.surgery import cut, measure_importance
from edgekd.surgery.importance import in_order
from edgekd.surgery.sample import sample_batches
from edgekd.tasks import batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student
    from edgekd.supernet import Supernet


def train_supernet(settings: Supernet, student: Student, ctx: Context) -> Student:
    """See `Supernet.run`."""
    processes = this_process()
    ctx = ctx if processes.main else replace(ctx, progress=Silent())
    space = space_of(settings, student)
    examples = sample_batches(ctx.train, settings.examples, seed=ctx.seed)
    student = rewire(replace(student, ordered=False), measure_importance(replace(student, ordered=False), examples))
    student.model.to(processes.device)
    teacher = ctx.teacher.model.to(processes.device).eval()
    terms = parse_terms(settings.losses)
    torch.manual_seed(ctx.seed)
    wiring = wire(student, ctx.teacher, terms, batch=first_batch(ctx.train, processes), layer_map="source")
    if wiring.watches:
        raise RecipeError(
            "supernet compares hidden states and logits alone: use hidden_mse in place of what attention gives"
        )
    labels = known_labels(ctx.train)
    wires = Wires(student=student, whole=wiring, teacher_layers=len(ctx.teacher.arch.layers))
    teaching = teacher_source(settings, ctx, terms, wires.union(space), labels, processes)
    sandwich = Sandwich(
        slices=Slices(student),
        space=space,
        samples=settings.samples,
        terms=terms,
        wires=wires,
        teacher=teaching,
        labels=labels,
    )
    precision = choose_precision(settings.precision, processes.device, student.model)
    score = scorer(student, space, ctx, precision)
    with ExitStack() as changes:
        if freezes_embeddings(settings, ctx):
            changes.enter_context(frozen([student.family.embeddings(student.model)]))
        job = Job(
            modules=nn.ModuleDict({"student": student.model, **wiring.trained()}).to(processes.device),
            plan=lambda epoch: batches(ctx.train, settings.batch_size, seed=ctx.seed, epoch=epoch, shuffle=True),
            collate=lambda indices: without_labels(ctx.train.collate(indices)),
            loss=sandwich,
            evaluate=lambda: float(np.mean(list(score().values()))),
            fingerprint=job_fingerprint(settings, ctx, teacher),
        )
        outcome = train(job, loop_settings(settings), seed=ctx.seed, work=ctx.work, progress=ctx.progress)
    scores = score()
    ctx.notes.update(training=describe(outcome), space=_facts(space), scores=scores)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    ctx.progress.say(f"supernet: {ctx.task.metric} on validation, untrained any further: {figures}")
    teacher.cpu()
    bounds = {"layers": space.fewest, "heads": settings.heads, "neurons": settings.neurons}
    return replace(student, model=student.model.cpu().eval(), trained=bounds)


def space_of(settings: Supernet, student: Student) -> Space:
    """The sub-networks that these settings train."""
    family = student.family
    return Space(
        arch=student.arch,
        droppable=tuple(family.droppable(student.model, i) for i in range(len(student.arch.layers))),
        layers=settings.layers,
        heads=settings.heads,
        neurons=settings.neurons,
    )


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """The loss of one batch: the mean over the largest network, the smallest, and some random ones."""

    slices: Slices
    space: Space
    samples: int
    terms: Sequence[Term]
    wires: Wires
    teacher: Source | None
    labels: Tensor

    def __call__(self, batch: Batch, indices: np.ndarray) -> Tensor:
        """The loss, averaged over networks and samples."""
        teacher = None if self.teacher is None else _once(self.teacher)
        shapes = [self.space.largest(), self.space.smallest()]
        shapes += [self.space.shape(draw) for _ in range(self.samples)]
        losses = [self.objective(shape, teacher)(batch, indices) for shape in shapes]
        return torch.stack(losses).mean()

    def objective(self, arch: Arch, teacher: Source | None) -> Objective:
        """What one sub-network is compared with."""
        network = self.slices(arch)
        wiring = self.wires.of(network)
        return Objective(model=network.model, terms=self.terms, wiring=wiring, teacher=teacher, labels=self.labels)


@dataclass(frozen=True, kw_only=True)
class Wires:
    """How sub-networks of `student` are compared with a teacher of so many layers; `whole` is its own wiring."""

    student: Student
    whole: Wiring
    teacher_layers: int

    @property
    def by_layer(self) -> bool:
        """Whether there is a hidden state for every layer, as encoders have, and not one for every stage."""
        return bool(self.student.arch.head_dim)

    def of(self, network: Student) -> Wiring:
        """The wiring of one sub-network."""
        layers = [layer.source for layer in network.arch.layers]
        pairs, last, projectors = self.whole.pairs, self.whole.last, self.whole.projectors
        if self.by_layer and pairs:
            pairs = self.pairs(layers)
            position = {layer.source: i for i, layer in enumerate(self.student.arch.layers)}
            projectors = nn.ModuleList([projectors[position[layer]] for layer in layers])
        if self.by_layer and last is not None:
            last = (len(layers), last[1])
        qkv: tuple[nn.Module, ...] = ()
        if self.whole.student_qkv and network.family.qkv is not None:
            qkv = tuple(network.family.qkv(network.family.layers(network.model)[-1]))
        return replace(self.whole, pairs=pairs, last=last, projectors=projectors, student_qkv=qkv)

    def pairs(self, layers: Sequence[int]) -> Pairs:
        """Each layer of a sub-network with the teacher's layer that it comes from."""
        return source(len(layers), self.teacher_layers, layers)

    def union(self, space: Space) -> Wiring:
        """A wiring that asks for all hidden states of the teacher that some sub-network is compared with."""
        if not self.by_layer or not self.whole.pairs:
            return self.whole
        found: set[tuple[int, int]] = set(self.whole.pairs)
        for depth in range(space.fewest, len(space.droppable) + 1):
            kept = kept_layers(space.droppable, depth)
            found |= set(self.pairs([space.arch.layers[i].source for i in kept]))
        return replace(self.whole, pairs=tuple(sorted(found)))


def _once(teacher: Source) -> Source:
    """The same signals for all networks of one step, fetched once."""
    seen: list[Signals] = []

    def source(indices: np.ndarray, batch: Batch) -> Signals:
        if not seen:
            seen.append(teacher(indices, batch))
        return seen[0]

    return source


def scorer(student: Student, space: Space, ctx: Context, precision: str) -> Callable[[], dict[str, float]]:
    """A function that scores the present largest, middle and smallest network on validation."""

    def score() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, arch in (("largest", space.largest()), ("middle", space.middle()), ("smallest", space.smallest())):
            network = cut(student, arch, in_order(student))
            found[name] = evaluator(network.model, ctx, precision)()
        return found

    return score


def _facts(space: Space) -> dict[str, Any]:
    return {name: getattr(space, name)().describe() for name in ("largest", "middle", "smallest")}
