"""The only training loop: steps, evaluation, best weights, early stop, and going on where a kill left it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.context import Progress, Silent
from edgekd.distill.job import Job, Outcome
from edgekd.distill.meter import Meter
from edgekd.distill.optimizer import average, clones, copy_into, step_with_decay
from edgekd.distill.precision import autocast
from edgekd.distill.processes import this_process
from edgekd.distill.run import Run
from edgekd.distill.schedule import rate_at
from edgekd.distill.settings import Training


def train(job: Job, settings: Training, *, seed: int, work: Path, progress: Progress) -> Outcome:
    """Train the modules and leave them with the weights that scored best (the earlier ones at a tie).

    With one thread, a run that is killed and started again in the same `work` folder ends with the same bits.
    Each process of `accelerate launch` takes every n-th batch, so n processes act like n-fold accumulation.

    Raises:
        RecipeError: the loss became infinite or not a number.
    """
    processes = this_process()
    torch.manual_seed(seed + processes.rank)
    run = Run(job, settings, processes, seed=seed, work=work)
    run.restore()
    progress = progress if processes.main else Silent()
    meter = Meter(progress, run.state)
    progress.start("training", run.total)
    progress.advance(run.state.step)
    try:
        while not run.state.done:
            _epoch(run, meter)
    finally:
        progress.stop()
    copy_into(run.weights(), run.best)
    job.modules.eval()
    state = run.state
    return Outcome(metric=state.best or 0.0, best_step=state.best_step, steps=state.step, history=tuple(state.history))


def _groups(run: Run) -> Iterator[list[np.ndarray]]:
    """The rest of the epoch's batches, as many together as one optimizer step takes."""
    batches = run.job.plan(run.state.epoch)
    for first in range(run.state.group * run.stride, len(batches), run.stride):
        yield batches[first : first + run.stride]


def _epoch(run: Run, meter: Meter) -> None:
    """Train from the present position to the end of the epoch."""
    job, state, settings = run.job, run.state, run.settings
    job.modules.train()
    for group in _groups(run):
        loss, checkpoint = _step(run, group)
        state.step, state.group = state.step + 1, state.group + 1
        meter.add(loss)
        if settings.evaluate_steps and state.step % settings.evaluate_steps == 0:
            _evaluate(run, meter)
        if checkpoint and not state.done:
            meter.flush()
            run.save()
        if state.done:
            return
    state.epoch, state.group = state.epoch + 1, 0
    state.done = state.epoch >= settings.epochs
    if state.done and state.history and state.history[-1]["step"] == state.step:
        run.save()
    elif not settings.evaluate_steps or state.done:
        _evaluate(run, meter)


def _step(run: Run, group: list[np.ndarray]) -> tuple[Tensor, bool]:
    """One optimizer step over a group of batches, each weighted by its samples: mean loss, and whether to save."""
    job, settings, processes = run.job, run.settings, run.processes
    if job.before_step is not None:
        job.before_step(run.state.step, run.total)
    samples = sum(len(indices) for indices in group)
    total = torch.zeros((), device=processes.device)
    for indices in group[processes.rank :: processes.size]:
        batch = {name: tensor.to(processes.device) for name, tensor in job.collate(indices).items()}
        with autocast(processes.device, run.precision):
            loss = job.loss(batch, indices) * (len(indices) / samples)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    total, checkpoint = processes.sum_gradients(run.parameters.values(), total, run.due())
    if settings.gradient_clip:
        nn.utils.clip_grad_norm_(run.parameters.values(), settings.gradient_clip, foreach=True)
    factor = rate_at(run.state.step, run.total, warmup=settings.warmup, schedule=settings.schedule)
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = settings.learning_rate * factor
    step_with_decay(run.optimizer, job.decay(run.state.step, run.total) if job.decay is not None else {})
    run.optimizer.zero_grad(set_to_none=True)
    if job.after_step is not None:
        job.after_step()
    if run.shadow:
        average(run.shadow, run.parameters, min(settings.ema, (run.state.step + 1) / (run.state.step + 10)))
    return total, checkpoint


def _evaluate(run: Run, meter: Meter) -> None:
    """Score the weights (their average, with ema), keep them if best, stop early if asked, save a checkpoint."""
    state, settings = run.state, run.settings
    mean = meter.take_mean(settings.learning_rate)
    trained = clones(run.parameters) if run.shadow else {}
    copy_into(run.parameters, run.shadow)
    run.job.modules.eval()
    metric = run.processes.from_main(run.job.evaluate() if run.processes.main else 0.0)
    if run.job.settled(state.step, run.total):
        _keep_if_best(run, metric)
    copy_into(run.parameters, trained)
    run.job.modules.train()
    state.history.append({"step": state.step, "epoch": state.epoch, "loss": mean, "metric": metric})
    state.done = state.done or 0 < settings.patience <= state.waited
    meter.flush(metric=metric)
    run.save()


def _keep_if_best(run: Run, metric: float) -> None:
    state = run.state
    if state.best is None or metric > state.best:
        state.best, state.best_step, state.waited = metric, state.step, 0
        run.best = clones(run.weights())
    else:
        state.waited += 1
