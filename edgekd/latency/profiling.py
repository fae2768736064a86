"""Profile one ONNX model on one target: measure, judge, and say how much the figures can be trusted."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd.devices import Operator, is_estimated, unavailable
from edgekd.errors import ModelError, TargetError
from edgekd.latency import stats
from edgekd.latency.artifact import find_artifact
from edgekd.latency.bench import Settings
from edgekd.latency.comparison import compare
from edgekd.latency.estimate import estimate
from edgekd.latency.looks import Asked, Budget, Looks, Say
from edgekd.latency.placement import fallbacks, overlaps, shares, wanted
from edgekd.latency.remarks import remarks, surroundings
from edgekd.latency.result import ProfileResult
from edgekd.latency.sweep import Axis, Point, mean_interval, sweep
from edgekd.latency.verdict import decide, judge
from edgekd.latency.workload import Fed, Workload
from edgekd.target import Target, load_target, probe

__all__ = ["ProfileResult", "profile"]


def profile(
    model: str | Path,
    target: str | Path | Target = "local",
    *,
    batch: int | None = None,
    sequence: int | None = None,
    threads: int | None = None,
    cpus: Sequence[int] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    values: Mapping[str, float] | None = None,
    feeds: str | Path | None = None,
    session: Mapping[str, Any] | None = None,
    baseline: str | Path | None = None,
    latency_p95_ms: float | None = None,
    speedup: float | None = None,
    tell_apart: bool = False,
    batches: Sequence[int] = (),
    sequences: Sequence[int] = (),
    per_operator: bool = False,
    out: str | Path | None = None,
    settings: Settings | None = None,
    say: Say = lambda text: None,
) -> ProfileResult:
    """Measure an ONNX file, a bundle, or a folder with one model; no recipe is needed.

    With a budget (`latency_p95_ms` in milliseconds, or `speedup` over `baseline`) it keeps measuring, within bounds,
    until the verdict is clear, with `tell_apart` until it is clear which of model and baseline is faster. `batch`,
    `sequence`, `shapes`, `values` and `feeds` choose the inputs (see `edgekd.latency.feeds`), `batches` and
    `sequences` more sizes to measure. `cpus` are those to stay on and `session` options of the runtime. `out` keeps
    what a vendor's compiler makes of the model. `say` hears what is going on. A target that is not there gives a
    measurement of kind `unavailable`, one with a compiler a `vendor_estimate`.

    Raises:
        TargetError: no such target, it cannot do what is asked, or more threads than this process may use.
        ModelError: a model cannot be found, read, fed, loaded, compiled or run.
    """
    counts = {"batch": batch, "sequence": sequence, "threads": threads, "batches": batches, "sequences": sequences}
    _check_counts(counts)
    if speedup is not None and baseline is None:
        raise ModelError("a speedup needs a baseline: the model to be faster than")
    feeds, out = (None if path is None else Path(path) for path in (feeds, out))
    target = probe(target if isinstance(target, Target) else load_target(target))
    models = {"model": find_artifact(model), **({"baseline": find_artifact(baseline)} if baseline else {})}
    chosen = {"batch": batch, "sequence": sequence, "threads": threads, "cpus": cpus, "shape": shapes,
              "value": values, "feeds": feeds, "session": session, "out": out}  # fmt: skip
    _check(target, [name for name, value in chosen.items() if value])
    with tempfile.TemporaryDirectory(prefix="edgekd-profile-") as name:
        workload = Workload(
            target=target, folder=Path(name), batch=batch, sequence=sequence, threads=threads, cpus=tuple(cpus),
            shapes=shapes or {}, values=values or {}, feeds=feeds, session=session or {},
        )  # fmt: skip
        asked = Asked(
            models=models, workload=workload, budget=Budget(latency_p95_ms=latency_p95_ms, speedup=speedup),
            tell_apart=tell_apart, sweeps={"batch": tuple(batches), "sequence": tuple(sequences)},
            per_operator=per_operator, settings=settings or Settings(memory=True), say=say,
        )  # fmt: skip
        if reason := unavailable(target):
            return _missing(asked, reason)
        return _estimated(asked, out) if is_estimated(target) else _measured(asked)


def _check_counts(counts: Mapping[str, int | Sequence[int] | None]) -> None:
    """Refuse numbers below 1.

    Raises:
        ModelError: there are some.
    """
    for name, value in counts.items():
        each = () if value is None else (value,) if isinstance(value, int) else value
        if wrong := [number for number in each if number < 1]:
            raise ModelError(f"{name}: expected whole numbers of at least 1, got {wrong[0]}")


def _check(target: Target, chosen: Sequence[str]) -> None:
    """Refuse options that would have no effect on this target.

    Raises:
        TargetError: some are chosen.
    """
    if is_estimated(target):
        idle = [name for name in chosen if name != "out"]
        reason = "is compiled for, with the model as it stands in the file"
    else:
        idle = [name for name in chosen if name == "out" or (name == "session" and target.runtime != "onnxruntime")]
        reason = "has no compiled model to keep" if "out" in idle else f"runs models with {target.runtime}"
    if idle:
        names = ", ".join(f"--{name}" for name in idle)
        raise TargetError(f"{names} would have no effect: target {target.name!r} {reason}")


def _measured(asked: Asked) -> ProfileResult:
    workload, path = asked.workload, asked.model.path
    workload.check(list(asked.models.values()))
    around = surroundings(workload.target)
    fed = [workload.feed(name, model) for name, model in asked.models.items()]
    unlike = _unlike(asked, fed)
    looks = Looks(fed, asked)
    measurement, verdict = decide(looks.more, clear=looks.is_clear, **asked.budget)
    points: dict[Axis, tuple[Point, ...]] = {}
    # The curve of a sweep needs less than the tail of the model itself.
    short = replace(asked.settings, blocks=-(-asked.settings.blocks // 2), min_runs=asked.settings.min_runs // 2,
                    memory=False)  # fmt: skip
    for axis, sizes in asked.sweeps.items():
        points[axis] = sweep(workload, asked.model, axis, sizes, settings=short, say=asked.say)
    operators: Sequence[Operator] = ()
    if asked.per_operator:
        asked.say("tracing operators")
        operators = workload.operators(fed[0])
    notes = (*unlike, *remarks(measurement, looks.samples, around), *overlaps(operators))
    measurement = replace(measurement, notes=notes)
    return ProfileResult(
        model=path,
        measurement=measurement,
        verdict=verdict if asked.has_budget else None,
        mean_ci95_ms=mean_interval(looks.samples[0]),
        **_placed(operators, workload.target),
        batches=points["batch"],
        sequences=points["sequence"],
        comparison=looks.comparison(asked.models, measurement),
        samples=looks.samples,
        conditions=asked.conditions(looks.samples),
    )


def _unlike(asked: Asked, fed: Sequence[Fed]) -> tuple[str, ...]:
    """What to say of models whose inputs have different sizes, and so not the same work.

    Raises:
        ModelError: one of them could have been fed as the other; or no model has tokens, and a number of them is asked.
    """
    workload = asked.workload
    if workload.sequence is not None and all(each.sequence is None for each in fed):
        raise ModelError(f"--sequence would have no effect: {asked.model.path} has no sequence dimension")
    notes = []
    for kind in ("batch", "sequence"):
        sizes = {str(each.subject.path): getattr(each, kind) for each in fed}
        if None in sizes.values() or len(set(sizes.values())) < 2:
            continue
        shown = ", ".join(f"{path} a {kind} of {size}" for path, size in sizes.items())
        for size in sorted(set(sizes.values())):
            if not workload.shapes and _takes(asked, kind, size):
                raise ModelError(f"the models would do different work: {shown}; give --{kind} {size}")
        notes.append(f"the models do different work: {shown}")
    return tuple(notes)


def _takes(asked: Asked, kind: str, size: int) -> bool:
    """Whether all models can be fed with that batch or sequence."""
    try:
        for model in asked.models.values():
            asked.workload.feed("trial", model, **{kind: size})
    except ModelError:
        return False
    return True


def _estimated(asked: Asked, out: Path | None) -> ProfileResult:
    target = asked.workload.target
    with _kept(out, asked.workload.folder) as folder:
        measurement, estimates = estimate(target, asked.models, folder, say=asked.say)
        verdict = judge(measurement, **asked.budget) if asked.has_budget else None
        comparison = None
        if "baseline" in estimates:
            a_measurement = replace(
                measurement, p50_ms=estimates["baseline"].ms, teacher_p50_ms=None, speedup=None, throughput=None
            )
            comparison = compare(asked.models["baseline"].path, asked.model.path, a_measurement, measurement)
        reason = f"{target.name} compiles a model for one size: profile a bundle of that size instead"
        points = {
            axis: tuple(Point(size=size, reason=reason) for size in sizes) for axis, sizes in asked.sweeps.items()
        }
        return ProfileResult(
            model=asked.model.path,
            measurement=measurement,
            verdict=verdict,
            **_placed(estimates["model"].operators, target),
            batches=points["batch"],
            sequences=points["sequence"],
            comparison=comparison,
            estimate=estimates["model"],
            kept=out,
            conditions=asked.conditions(),
        )


def _missing(asked: Asked, reason: str) -> ProfileResult:
    workload = asked.workload
    missing = stats.unavailable(workload.target.name, reason, batch=workload.batch or 1, sequence=workload.sequence)
    verdict = judge(missing, **asked.budget) if asked.has_budget else None
    return ProfileResult(model=asked.model.path, measurement=missing, verdict=verdict, conditions=asked.conditions())


def _placed(operators: Sequence[Operator], target: Target) -> dict[str, Any]:
    return {
        "operators": tuple(operators),
        "placement": shares(operators),
        "fallback": fallbacks(operators, target),
        "wanted": wanted(target),
    }


@contextlib.contextmanager
def _kept(out: Path | None, scratch: Path) -> Iterator[Path]:
    """The folder to compile into: `out`, or one that goes away with the scratch folder."""
    if out is None:
        yield scratch / "compiled"
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"cannot keep the compiled model in {out}: {error.strerror}") from None
    yield out
