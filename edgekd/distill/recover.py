"""The distillation stage: connect student and teacher, and run the loop."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.context import Silent
from edgekd.distill.adjust import dropout, frozen
from edgekd.distill.cache import cache_bytes, cached
from edgekd.distill.job import Batch, Job, Training, describe
from edgekd.distill.loop import train
from edgekd.distill.objective import Objective
from edgekd.distill.precision import choose_precision
from edgekd.distill.processes import Processes, this_process
from edgekd.distill.signals import observe
from edgekd.distill.teachers import Source, fingerprint, live, predict
from edgekd.distill.terms import Term, parse_terms
from edgekd.distill.wiring import Wiring, wire
from edgekd.files import sha256_json
from edgekd.tasks import batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.distill import Distill
    from edgekd.student import Student
    from edgekd.tasks import Encoded


def recover(settings: Distill, student: Student, ctx: Context) -> Student:
    """Train a copy of the student; see `Distill.run`."""
    processes = this_process()
    ctx = ctx if processes.main else replace(ctx, progress=Silent())
    torch.manual_seed(ctx.seed)
    student = replace(student, model=copy.deepcopy(student.model).to(processes.device))
    teacher = ctx.teacher.model.to(processes.device).eval()
    terms = parse_terms(settings.losses)
    wiring = wire(student, ctx.teacher, terms, batch=_one_batch(ctx.train, processes), layer_map=settings.layer_map)
    labels = _labels(ctx.train)
    with ExitStack() as changes:
        changes.enter_context(dropout(student.model, settings.dropout))
        if _freezes(settings, ctx):
            changes.enter_context(frozen([student.family.embeddings(student.model)]))
        source = _source(settings, ctx, terms, wiring, labels, processes)
        objective = Objective(model=student.model, terms=terms, wiring=wiring, teacher=source, labels=labels)
        job = Job(
            modules=nn.ModuleDict({"student": student.model, "projectors": wiring.projectors.to(processes.device)}),
            plan=lambda epoch: batches(ctx.train, settings.batch_size, seed=ctx.seed, epoch=epoch, shuffle=True),
            collate=lambda indices: without_labels(ctx.train.collate(indices)),
            loss=objective,
            evaluate=evaluator(
                student.model, ctx, choose_precision(settings.precision, processes.device, student.model)
            ),
            fingerprint=_fingerprint(settings, ctx, teacher),
        )
        outcome = train(job, loop_settings(settings), seed=ctx.seed, work=ctx.work, progress=ctx.progress)
    ctx.notes["training"] = describe(outcome)
    ctx.progress.say(f"distilled: {ctx.task.metric} {outcome.metric:.4f} on validation, after {outcome.steps} steps")
    teacher.cpu()
    return replace(student, model=student.model.cpu().eval())


def loop_settings(settings: Any) -> Training:
    """The settings of the loop among those of a stage."""
    names = {field.name for field in fields(Training)} & {field.name for field in fields(settings)}
    return Training(**{name: getattr(settings, name) for name in names})


def evaluator(model: nn.Module, ctx: Context, precision: str) -> Callable[[], float]:
    """A function that scores the present weights on validation; the teacher stands in for missing labels."""
    truth = _labels(ctx.validation).numpy()
    if (truth < 0).any():
        truth = np.where(truth < 0, predict(ctx.teacher.model, ctx.validation).argmax(-1), truth)
    return lambda: ctx.task.score(predict(model, ctx.validation, precision=precision), truth)


def without_labels(batch: Batch) -> Batch:
    """What a model takes; losses get labels on their own."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _labels(data: Encoded) -> Tensor:
    """Labels int64 `[N]`, -1 where there are none."""
    return torch.full((len(data),), -1) if data.labels is None else torch.from_numpy(np.asarray(data.labels, np.int64))


def _one_batch(data: Encoded, processes: Processes) -> Batch:
    batch = without_labels(data.collate(np.arange(min(2, len(data)))))
    return {name: tensor.to(processes.device) for name, tensor in batch.items()}


def _freezes(settings: Distill, ctx: Context) -> bool:
    return ctx.task.kind == "text" if settings.freeze_embeddings is None else settings.freeze_embeddings


def _source(
    settings: Distill, ctx: Context, terms: Sequence[Term], wiring: Wiring, labels: Tensor, processes: Processes
) -> Source | None:
    """Where teacher signals come from: nowhere if no loss needs them, the cache if they fit, else the live teacher."""
    if all(term.loss.needs == ("labels",) for term in terms) and bool((labels >= 0).all()):
        return None
    teacher, hidden = ctx.teacher.model, wiring.teacher_layers
    running = live(teacher, hidden=hidden, qkv=wiring.teacher_qkv)
    if not settings.cache or wiring.teacher_qkv:
        return running
    size = _cache_bytes(ctx, hidden, processes)
    free = shutil.disk_usage(_existing(ctx.cache)).free
    if size > min(settings.cache_limit_gb * 1e9, free):
        ctx.progress.say(
            f"teacher outputs would take {size / 1e9:.1f} GB (cache_limit_gb is {settings.cache_limit_gb:g}, "
            f"{free / 1e9:.1f} GB are free): the teacher runs along instead, which is slower"
        )
        return running
    ctx.progress.say(f"teacher outputs: {size / 1e6:.1f} MB in {ctx.cache}")
    return cached(teacher, ctx.train, hidden=hidden, folder=ctx.cache, device=processes.device, progress=ctx.progress)


def _cache_bytes(ctx: Context, hidden: Sequence[int], processes: Processes) -> int:
    """What the cache would take, reckoned from two samples."""
    batch = _one_batch(ctx.train, processes)
    with torch.no_grad():
        signals = observe(ctx.teacher.model, batch, hidden=hidden)
    rows = [(len(states), states.shape[1]) for states in signals.hidden.values()]
    samples = len(signals.logits)
    tokens = int(ctx.train.lengths.sum())
    sizes = [
        (tokens if "attention_mask" in batch else count // samples * len(ctx.train), width) for count, width in rows
    ]
    return cache_bytes(sizes, len(ctx.train), signals.logits.shape[1])


def _existing(path: Any) -> Any:
    """The nearest folder above that is there."""
    while not path.exists():
        path = path.parent
    return path


def _fingerprint(settings: Distill, ctx: Context, teacher: nn.Module) -> str:
    """All that the trained weights depend on besides the student, the loop's settings and the seed."""
    kept = {name: value for name, value in asdict(settings).items() if not name.startswith(("cache", "checkpoint"))}
    data = [[part.fingerprint, _labels(part).tolist()] for part in (ctx.train, ctx.validation)]
    return sha256_json([kept, fingerprint(teacher), data])
