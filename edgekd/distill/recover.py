"""The distillation stage: connect student and teacher, and run the loop."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.context import Silent
from edgekd.distill.adjust import dropout, frozen
from edgekd.distill.cache import cache_bytes, cached
from edgekd.distill.job import Batch, Job, Outcome, describe
from edgekd.distill.loop import train
from edgekd.distill.noise import with_noise
from edgekd.distill.objective import Objective
from edgekd.distill.precision import choose_precision
from edgekd.distill.processes import Processes, this_process
from edgekd.distill.settings import Training
from edgekd.distill.signals import observe
from edgekd.distill.teachers import Source, fingerprint, live, predict
from edgekd.distill.terms import Term, parse_terms
from edgekd.distill.wiring import Wiring, wire
from edgekd.errors import ModelError, RecipeError
from edgekd.files import sha256_json
from edgekd.tasks import batches

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.distill import Distill
    from edgekd.student import Student
    from edgekd.tasks import Encoded


def recover(settings: Distill, student: Student, ctx: Context) -> Student:
    """Train a copy of the student; see `Distill.run`."""
    student = replace(student, model=copy.deepcopy(student.model))
    outcome = fit(settings, student, ctx)
    ctx.progress.say(f"distilled: {ctx.task.metric} {outcome.metric:.4f} on validation, after {outcome.steps} steps")
    return student


def fit(
    settings: Any,
    student: Student,
    ctx: Context,
    *,
    teacher: Student | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    after_step: Callable[[], None] | None = None,
    precision: str | None = None,
    change: Callable[[Job], Job] = lambda job: job,
) -> Outcome:
    """Train the model of a student in place, and leave it on the CPU in `eval()` mode with its best weights.

    Args:
        settings: of a stage that trains, such as `Distill`.
        student: whose model is trained.
        ctx: the surroundings; `notes["training"]` is filled.
        teacher: whom to learn from, if not the run's teacher, which still labels what has no label.
        modules: what else is trained, or has a state to keep with the weights, by name.
        after_step: runs after every optimizer step.
        precision: of evaluation (default: that of training).
        change: makes the job another one before it runs.

    Raises:
        RecipeError: a loss cannot be had for these two models, or training diverged.
    """
    processes = this_process()
    ctx = ctx if processes.main else replace(ctx, progress=Silent())
    torch.manual_seed(ctx.seed)
    ctx, copies = with_copies(settings, ctx)
    student.model.to(processes.device)
    taught = replace(ctx, teacher=teacher or ctx.teacher)
    taught.teacher.model.to(processes.device).eval()
    terms = parse_terms(settings.losses)
    layer_map = getattr(settings, "layer_map", "even")
    wiring = wire(student, taught.teacher, terms, batch=first_batch(ctx.train, processes), layer_map=layer_map)
    labelled = any("labels" in term.loss.needs for term in terms)
    labels = known_labels(ctx.train) if labelled else unknown_labels(ctx.train)
    with ExitStack() as changes:
        changes.enter_context(dropout(student.model, settings.dropout))
        if freezes_embeddings(settings, ctx):
            changes.enter_context(frozen([student.family.embeddings(student.model)]))
        source = teacher_source(settings, taught, terms, wiring, labels, processes)
        parts = {"student": student.model, **wiring.trained(), **(modules or {})}
        chosen = precision or choose_precision(settings.precision, processes.device, student.model)
        job = Job(
            modules=nn.ModuleDict(parts).to(processes.device),
            plan=lambda epoch: turns(ctx.train, copies, settings.batch_size, seed=ctx.seed, epoch=epoch),
            collate=lambda indices: without_labels(ctx.train.collate(indices)),
            loss=Objective(model=student.model, terms=terms, wiring=wiring, teacher=source, labels=labels),
            evaluate=evaluator(student.model, ctx, chosen),
            fingerprint=job_fingerprint(settings, ctx, taught.teacher.model, labels),
            after_step=after_step,
        )
        job = change(job)
        outcome = train(job, loop_settings(settings), seed=ctx.seed, work=ctx.work, progress=ctx.progress)
    ctx.notes["training"] = describe(outcome)
    taught.teacher.model.cpu()
    job.modules.cpu().eval()
    return outcome


def with_copies(settings: Any, ctx: Context) -> tuple[Context, int]:
    """The context with noisy copies of the training texts after these, and how many of each text there are.

    Raises:
        RecipeError: copies are asked for, and the task's examples are no texts.
    """
    asked = getattr(settings, "copies", 0)
    if asked and ctx.task.kind != "text":
        raise RecipeError(f"copies is {asked}, and only texts are copied with noise; leave it out for images")
    copies = min(asked, settings.epochs - 1)
    if not copies:
        return ctx, 0
    data: Any = ctx.train
    tokenizer = ctx.processor.hf
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return replace(ctx, train=with_noise(data, copies, special, seed=ctx.seed)), copies


def turns(data: Encoded, copies: int, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch: every example once, in the version whose turn it is."""
    if not copies:
        return list(batches(data, batch_size, seed=seed, epoch=epoch, shuffle=True))
    count = len(data) // (copies + 1)
    rows = (np.arange(count) + epoch) % (copies + 1) * count + np.arange(count)
    cut = batches(data.take(rows), batch_size, seed=seed, epoch=epoch, shuffle=True)
    return [rows[indices] for indices in cut]


def require_same_words(student: Student, ctx: Context) -> None:
    """Refuse the run's teacher for a student whose vocabulary was cut: it would be fed the student's own numbers.

    Raises:
        ModelError: they read the texts as other tokens.
    """
    if ctx.task.kind == "text" and student.arch.vocabulary != ctx.teacher.arch.vocabulary:
        raise ModelError(
            f"the student knows {student.arch.vocabulary} words and the teacher {ctx.teacher.arch.vocabulary}: they "
            "read the texts as other tokens and cannot be compared; set `teacher: student`, the student as it comes in"
        )


def loop_settings(settings: Training) -> Training:
    """The settings of the loop among those of a stage: the others are told by the job's fingerprint."""
    return Training(**{field.name: getattr(settings, field.name) for field in fields(Training)})


def evaluator(model: nn.Module, ctx: Context, precision: str) -> Callable[[], float]:
    """A function that scores the present weights on validation; the teacher stands in for missing labels."""
    truth = known_labels(ctx.validation).numpy()
    if (truth < 0).any():
        truth = np.where(truth < 0, predict(ctx.teacher.model, ctx.validation).argmax(-1), truth)
    return lambda: ctx.task.score(predict(model, ctx.validation, precision=precision), truth)


def without_labels(batch: Batch) -> Batch:
    """What a model takes; losses get labels on their own."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def known_labels(data: Encoded) -> Tensor:
    """Labels int64 `[N]`, -1 where there are none."""
    return unknown_labels(data) if data.labels is None else torch.from_numpy(np.asarray(data.labels, np.int64))


def unknown_labels(data: Encoded) -> Tensor:
    """Labels -1 of all examples `[N]`, whatever is known: for losses that look at none."""
    return torch.full((len(data),), -1)


def first_batch(data: Encoded, processes: Processes) -> Batch:
    """The first two samples, on the process's device: enough to see shapes."""
    batch = without_labels(data.collate(np.arange(min(2, len(data)))))
    return {name: tensor.to(processes.device) for name, tensor in batch.items()}


def freezes_embeddings(settings: Any, ctx: Context) -> bool:
    """Whether a stage leaves the embeddings as they are; unset, it does for text."""
    return ctx.task.kind == "text" if settings.freeze_embeddings is None else settings.freeze_embeddings


def teacher_source(
    settings: Any, ctx: Context, terms: Sequence[Term], wiring: Wiring, labels: Tensor, processes: Processes
) -> Source | None:
    """Where teacher signals come from: nowhere if no loss needs them, the cache if they fit, else the live teacher."""
    if all(term.loss.needs == ("labels",) for term in terms) and bool((labels >= 0).all()):
        return None
    teacher, shown = ctx.teacher.model, wiring.of("teacher")
    running = live(teacher, precision=choose_precision(settings.precision, processes.device, teacher), **shown)
    if not settings.cache or wiring.uncached:
        return running
    kept = {"hidden": shown["hidden"], "outputs": shown["outputs"]}
    size = _cache_bytes(ctx, kept, processes)
    free = shutil.disk_usage(_existing(ctx.cache)).free
    if size > min(settings.cache_limit_gb * 1e9, free):
        ctx.progress.say(
            f"teacher outputs would take {size / 1e9:.1f} GB (cache_limit_gb is {settings.cache_limit_gb:g}, "
            f"{free / 1e9:.1f} GB are free): the teacher runs along instead, which is slower"
        )
        return running
    ctx.progress.say(f"teacher outputs: {size / 1e6:.1f} MB in {ctx.cache}")
    return cached(teacher, ctx.train, **kept, folder=ctx.cache, device=processes.device, progress=ctx.progress)


def _cache_bytes(ctx: Context, kept: Mapping[str, Any], processes: Processes) -> int:
    """What the cache would take, reckoned from two samples."""
    batch = first_batch(ctx.train, processes)
    with torch.no_grad():
        signals = observe(ctx.teacher.model, batch, **kept)
    rows = [(len(states), states.shape[1]) for states in (*signals.hidden.values(), *signals.outputs.values())]
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


def job_fingerprint(settings: Any, ctx: Context, teacher: nn.Module, labels: Tensor | None = None) -> str:
    """All that the trained weights depend on besides the student, the loop's settings and the seed.

    `labels` are those of the training data that losses see, if not all.
    """
    kept = {name: value for name, value in asdict(settings).items() if not name.startswith(("cache", "checkpoint"))}
    labels = known_labels(ctx.train) if labels is None else labels
    data = [
        [ctx.train.fingerprint, labels.tolist()],
        [ctx.validation.fingerprint, known_labels(ctx.validation).tolist()],
    ]
    return sha256_json([kept, fingerprint(teacher), data])
