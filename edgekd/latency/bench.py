"""Measure models in a process of their own: pinned, warmed up, in turns, raw samples back."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import host
from edgekd.devices import Operator, device_of, unavailable, usual_threads
from edgekd.errors import ModelError, TargetError
from edgekd.latency.feeds import Feeds, read_feeds, synthesize
from edgekd.latency.stats import Samples
from edgekd.target import Target

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One ONNX file to measure.

    `options` are session options (`graph_optimization`, `disabled_optimizers`, `config`) over the target's own;
    `feeds` an .npz file of inputs by name (without it they are made up from the graph).
    """

    name: str
    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    feeds: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to measure.

    At least `min_runs` inferences of each model in `blocks` blocks of about `block_ms`, unless `max_seconds` run out
    first. The verdict's p95 needs about 105 independent blocks. `memory` measures load time, first inference and
    peak memory of each model in a fresh process of its own.
    """

    blocks: int = 120
    block_ms: float = 20.0
    min_runs: int = 240
    max_seconds: float = 30.0
    window_ms: float = 50.0
    warmup_seconds: float = 3.0
    settle_runs: int = 2
    memory: bool = False
    seed: int = 0


def measure(
    models: Sequence[Subject],
    *,
    target: Target,
    batch: int | None = 1,
    sequence: int | None = None,
    threads: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    cpus: Sequence[int] | None = None,
    settings: Settings | None = None,
) -> list[Samples]:
    """Time models side by side on a target; latencies in milliseconds, one `Samples` for each model, in order.

    `batch`, `sequence` and `shapes` say which inputs to make up (see `edgekd.latency.feeds`); `threads` and `cpus`
    None take the target's, or else every core and the quietest of them. Models measured in one call share their
    blocks, which makes their ratio free of common drift.

    Raises:
        TargetError: the target cannot be measured from here, or measuring takes too long.
        ModelError: a model cannot be read, fed, loaded or run.
    """
    settings = settings or Settings()
    with tempfile.TemporaryDirectory(prefix="edgekd-latency-") as name:
        folder = Path(name)
        work = _Work(target, threads, cpus, folder, settings)
        feeds = [_feeds(model, batch, sequence, shapes, settings.seed) for model in models]
        specs = [work.spec(index, model, feeds[index]) for index, model in enumerate(models)]
        answer = work.ask("time", specs)
        with np.load(folder / "samples.npz") as arrays:
            taken = [(arrays[f"ms_{index}"], arrays[f"block_{index}"]) for index in range(len(models))]
        facts = answer["subjects"]
        if settings.memory:
            facts = [{**fact, **work.weigh(spec)} for fact, spec in zip(facts, specs, strict=True)]
    return [
        Samples(
            name=model.name,
            ms=ms,
            block=block,
            batch=fed.batch,
            sequence=fed.sequence,
            threads=work.threads,
            cpus=tuple(answer["cpus"]),
            load_ms=fact["load_ms"],
            first_ms=fact["first_ms"],
            peak_rss_mb=fact.get("peak_rss_mb"),
            settled=fact["settled"],
            preemptions=answer["preemptions"],
            facts=answer["host"],
        )
        for model, (ms, block), fed, fact in zip(models, taken, feeds, facts, strict=True)
    ]


def trace_operators(
    model: Subject,
    *,
    target: Target,
    batch: int | None = 1,
    sequence: int | None = None,
    threads: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    cpus: Sequence[int] | None = None,
    runs: int = 50,
    max_seconds: float = 10.0,
) -> Sequence[Operator]:
    """Time per operator type, from the runtime's own profiler (which slows the model down: shares count, not sums).

    Raises:
        TargetError, ModelError: as `measure`.
    """
    settings = Settings(warmup_seconds=1.0, max_seconds=max_seconds)
    with tempfile.TemporaryDirectory(prefix="edgekd-latency-") as name:
        work = _Work(target, threads, cpus, Path(name), settings)
        spec = work.spec(0, model, _feeds(model, batch, sequence, shapes, settings.seed))
        answer = work.ask("trace", [spec], runs=runs, trace=str(Path(name) / "trace"))
        # Only the name counts: the answer may come from another machine.
        trace = Path(name) / Path(str(answer["trace"])).name
        return device_of(target).placement(trace, warm_runs=answer["warm_runs"])


def choose_cpus(threads: int) -> tuple[int, ...]:
    """As many CPUs as threads: distinct physical cores, the quietest ones; their siblings only when those run out.

    Raises:
        TargetError: this process may not use that many CPUs.
    """
    cores, logical = host.physical_cores(), host.logical_cpus()
    if threads > len(logical):
        raise TargetError(f"{threads} threads asked, but this process may use {len(logical)} CPUs: ask for fewer")
    if threads <= len(cores):
        return host.quietest(cores, threads)
    siblings = [cpu for cpu in logical if cpu not in cores]
    return tuple(sorted((*cores, *siblings[: threads - len(cores)])))


class _Work:
    """What the requests of one measurement share."""

    def __init__(
        self, target: Target, threads: int | None, cpus: Sequence[int] | None, folder: Path, settings: Settings
    ) -> None:
        if reason := unavailable(target):
            raise TargetError(f"target {target.name!r} is unavailable: {reason}")
        self.target, self.folder, self.settings = target, folder, settings
        given, is_local = tuple(cpus or target.cpus), target.reach_by == "local"
        usual = target.threads or len(given) or usual_threads(target)
        self.threads = threads or min(usual, len(cpus or ()) or usual)
        if given and self.threads > len(given):
            raise TargetError(f"{self.threads} threads asked, but only CPUs {list(given)} to run on: give more of them")
        # None leaves the choice to the worker, which sees the CPUs of the board it runs on.
        self.cpus = given or (choose_cpus(self.threads) if is_local else None)

    def spec(self, index: int, model: Subject, feeds: Feeds) -> dict[str, Any]:
        """One model of a request."""
        file = self.folder / f"feeds_{index}.npz"
        arrays: dict[str, Any] = dict(feeds.arrays)
        np.savez(file, **arrays)
        session = device_of(self.target).prepare(self.target, threads=self.threads, options=model.options)
        return {"name": model.name, "path": str(model.path.resolve()), "feeds": str(file), "session": session}

    def ask(self, job: str, specs: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """Have the worker do one job."""
        settings = self.settings
        request = {
            "job": job,
            "subjects": list(specs),
            "cpus": self.cpus,
            "samples": str(self.folder / "samples.npz"),
            **vars(settings),
            **more,
        }
        # Loading and the first two rounds are not limited by max_seconds: large models may take minutes for them.
        timeout = 300 + 2 * (settings.max_seconds + settings.warmup_seconds * len(specs))
        return device_of(self.target).run(self.target, WORKER, request, folder=self.folder, timeout=timeout)

    def weigh(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Load time, first inference and peak memory of one model in a fresh process."""
        answer = self.ask("weigh", [spec])
        fact = answer["subjects"][0]
        return {"peak_rss_mb": answer["peak_rss_mb"], "load_ms": fact["load_ms"], "first_ms": fact["first_ms"]}


def _feeds(
    model: Subject,
    batch: int | None,
    sequence: int | None,
    shapes: Mapping[str, Sequence[int]] | None,
    seed: int,
) -> Feeds:
    if not model.path.is_file():
        raise ModelError(f"there is no model file {model.path}")
    if model.feeds is None:
        return synthesize(model.path, batch=batch, sequence=sequence, shapes=shapes, seed=seed)
    return read_feeds(model.feeds)
