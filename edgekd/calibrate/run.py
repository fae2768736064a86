"""Calibrate: time what a latency table still lacks, a group at a time, until it is complete or the time is up."""

from __future__ import annotations

import contextlib
import datetime
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekd import host
from edgekd.arch import Arch, Layer
from edgekd.calibrate.bodies import Body, find_body
from edgekd.calibrate.estimates import Estimator, estimated_points, with_point
from edgekd.calibrate.graphs import build_graphs
from edgekd.calibrate.identity import fingerprint, runtime_of
from edgekd.calibrate.shapes import chains, convolution_shapes, mixed, references
from edgekd.calibrate.timing import time_beside
from edgekd.context import Progress, Silent
from edgekd.devices import is_estimated, unavailable, usual_threads
from edgekd.errors import ModelError, RecipeError, StoreError, TargetError, unknown
from edgekd.files import require_parent
from edgekd.latency.bench import Subject
from edgekd.latency.cell import Frame
from edgekd.latency.table import FIT, HELD_OUT, Conditions, LatencyTable, Point, load
from edgekd.target import Target
from edgekd.target_fields import RUNTIMES

GROUP_SIZE = 24


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a table is to hold.

    `bodies` are names of `edgekd.calibrate.bodies.STANDARD` or model folders; `shapes` pairs of batch and tokens
    (images have tokens of their own: only the batch counts). `mixed` random models a frame go into the fit,
    `held_out` further ones judge it.
    """

    bodies: tuple[str, ...]
    lowerings: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...] = ((1, 64),)
    mixed: int = 12
    held_out: int = 4
    seed: int = 0


@dataclass(frozen=True)
class _Group:
    """Shapes of one body to be built together and timed in every frame that lacks them."""

    body: str
    use: str
    archs: tuple[Arch, ...] = field(default_factory=tuple)


def calibrate(
    target: Target,
    plan: Plan,
    out: Path,
    *,
    threads: int | None = None,
    minutes: float | None = None,
    fresh: bool = False,
    models: Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Bring the table at `out` up to the plan; points it already has are kept, and it is saved after every group.

    `models` is a folder that keeps what is built for compilers, for a second target of the same form.

    Raises:
        TargetError: the target can be neither measured nor estimated from here.
        StoreError: the table at `out` has other conditions (and `fresh` is not given), or a path cannot be written.
        RecipeError, ModelError: a body or a lowering is not known or cannot be used.
    """
    progress = progress or Silent()
    known = RUNTIMES[target.runtime].lowerings
    for name in plan.lowerings:
        if name not in known:
            raise RecipeError(unknown(f"lowering for {target.runtime}", name, known))
    for path in (out, models):
        if path is not None:
            require_parent(path)
    if reason := unavailable(target):
        raise TargetError(f"target {target.name!r} is unavailable, so there is nothing to calibrate: {reason}")
    threads = threads or usual_threads(target)
    if target.reach_by == "local" and not is_estimated(target) and threads > (usable := len(host.logical_cpus())):
        raise TargetError(f"{threads} threads asked, but this process may use {usable} CPUs: ask for fewer")
    table = _start(target, out, threads, fresh)
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    with tempfile.TemporaryDirectory(prefix="edgekd-calibrate-") as name, _clock(target, Path(name), models) as clock:
        bodies = {each: find_body(each) for each in plan.bodies}
        groups = list(_groups(plan, bodies))
        progress.start("calibrate", len(groups))
        for group in groups:
            table = _take(_Job(group, bodies[group.body], target, plan, out, end), table, clock, progress)
            progress.advance()
            if time.monotonic() > end:
                progress.say("the time is up; the same command goes on where this one stopped")
                break
        progress.stop()
    table = table.refit()
    if table.points:
        table.save(out)
    return table


@dataclass(frozen=True)
class _Job:
    group: _Group
    body: Body
    target: Target
    plan: Plan
    out: Path
    end: float


@dataclass(frozen=True)
class _Clock:
    """Where latencies come from: the target itself, or a vendor's compiler."""

    work: Path
    estimator: Estimator | None = None


@contextlib.contextmanager
def _clock(target: Target, work: Path, models: Path | None) -> Iterator[_Clock]:
    if not is_estimated(target):
        yield _Clock(work)
        return
    with Estimator(target, work, models) as estimator:
        yield _Clock(work, estimator=estimator)


def _start(target: Target, out: Path, threads: int, fresh: bool) -> LatencyTable:
    estimated = is_estimated(target)
    conditions = Conditions(
        target=target.name,
        kind="vendor_estimate" if estimated else "measured",
        threads=threads,
        cpu="" if estimated or target.reach_by != "local" else host.cpu_name(),
        runtime=runtime_of(target),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        fingerprint=fingerprint(target),
        options={} if estimated else {"python": platform.python_version(), "onnx": metadata.version("onnx")},
    )
    if fresh or not out.exists():
        return LatencyTable(conditions=conditions)
    table = load(out)
    for key in ("target", "kind", "threads", "cpu", "runtime", "fingerprint"):
        was, now = getattr(table.conditions, key), getattr(conditions, key)
        if was != now:
            raise StoreError(
                f"{out} was made with {key} {was!r}, here it is {now!r}: choose another --out, or --fresh to begin anew"
            )
    return table


def _groups(plan: Plan, bodies: dict[str, Body]) -> Iterator[_Group]:
    """Chains of all bodies first, then mixed models, then those held out: a table cut short is of use too."""
    for number, use in enumerate((FIT, FIT, HELD_OUT)):
        for name, body in bodies.items():
            for archs in _chunks(_shapes(body, plan, number)):
                yield _Group(name, use, archs)


def _shapes(body: Body, plan: Plan, number: int) -> list[Arch]:
    arch, family = body.student.arch, body.student.family
    droppable = [family.droppable(body.student.model, i) for i in range(len(arch.layers))]
    if number == 0:
        return convolution_shapes(arch, droppable) if body.outline else chains(arch)
    both = mixed(arch, droppable, plan.mixed + plan.held_out, seed=plan.seed)
    return both[: plan.mixed] if number == 1 else both[plan.mixed :]


def _chunks(archs: Sequence[Arch]) -> Iterator[tuple[Arch, ...]]:
    for start in range(0, len(archs), GROUP_SIZE):
        yield tuple(archs[start : start + GROUP_SIZE])


def frames(body: Body, arch: Arch, plan: Plan) -> list[Frame]:
    """The frames in which a shape of a body is to be timed."""
    shapes = plan.shapes if body.image is None else [(batch, body.tokens) for batch, _ in plan.shapes]
    return [
        Frame(
            family=arch.family, hidden=arch.hidden, head_dim=arch.head_dim, lowering=lowering, batch=batch,
            sequence=tokens, outline=body.outline,
        )
        for lowering in dict.fromkeys(plan.lowerings) for batch, tokens in dict.fromkeys(shapes)
    ]  # fmt: skip


def _layers(arch: Arch) -> tuple[tuple[int, int, int], ...]:
    return tuple((layer.source, layer.heads, layer.neurons) for layer in arch.layers)


def _take(job: _Job, table: LatencyTable, clock: _Clock, progress: Progress) -> LatencyTable:
    """Build what is missing of a group, time it in every frame, and save the table after each."""
    group, body = job.group, job.body
    known = {(point.frame, point.layers) for point in table.points}
    wanted = frames(body, body.student.arch, job.plan)
    missing = [arch for arch in group.archs if any((frame, _layers(arch)) not in known for frame in wanted)]
    if not missing:
        return table
    progress.say(f"{body.name}: {len(missing)} models, {group.use}")
    if clock.estimator is not None:
        pairs = [(arch, frame) for arch in missing for frame in wanted]
        estimates = estimated_points(pairs, body, known, group.use, clock.estimator, end=job.end, say=progress.say)
        for point, found in estimates:
            table = with_point(table, point, found).refit([point.frame])
            table.save(job.out)
        return table
    return _measure(job, missing, wanted, known, table, clock.work)


def _measure(
    job: _Job, missing: list[Arch], wanted: list[Frame], known: set[Any], table: LatencyTable, work: Path
) -> LatencyTable:
    """Build shapes and time them beside references, which come first of all.

    When the time is up, what is built by then is still timed in one frame, so that every call gets further.
    """
    steady = {frame: reference_ms(table, frame, job.body) for frame in wanted}
    firsts = references(job.body.student.arch)
    planned = list(dict.fromkeys([*firsts, *(arch for known in steady.values() for arch in known), *missing]))
    files: dict[Arch, dict[Frame, Path]] = {}
    for i, arch in enumerate(planned):
        if time.monotonic() > job.end and i > len(planned) - len(missing):
            break
        files[arch] = frame_files(work, i, wanted, job.target)
        outputs = {path: frame for frame, path in files[arch].items()}
        build_graphs(job.body, arch, outputs, static=job.target.is_static, symmetric=job.target.symmetric)
    taken = 0
    for frame in wanted:
        lacking = [arch for arch in missing if arch in files and (frame, _layers(arch)) not in known]
        if lacking and (time.monotonic() < job.end or not taken):
            if not steady[frame]:
                lacking += [arch for arch in firsts if arch not in lacking and (frame, _layers(arch)) not in known]
            subjects = {arch: Subject(name=str(i), path=paths[frame]) for i, (arch, paths) in enumerate(files.items())}
            table = _measured(table, frame, lacking, subjects, steady[frame], job)
            table.save(job.out)
            taken += 1
    for path in {path for paths in files.values() for path in paths.values()}:
        path.unlink()
    return table


def frame_files(work: Path, index: int, wanted: Sequence[Frame], target: Target) -> dict[Frame, Path]:
    """The file of each frame; where shapes are free, one file serves all frames of a lowering."""
    names = {
        frame: f"{frame.lowering}-{frame.batch}-{frame.sequence}" if target.is_static else frame.lowering
        for frame in wanted
    }
    return {frame: work / f"{index}-{name}.onnx" for frame, name in names.items()}


def _measured(
    table: LatencyTable,
    frame: Frame,
    archs: Sequence[Arch],
    subjects: Mapping[Arch, Subject],
    steady: Mapping[Arch, float],
    job: _Job,
) -> LatencyTable:
    timed = time_beside(
        [(subjects[arch], ms) for arch, ms in steady.items()], [subjects[arch] for arch in archs], job.target,
        batch=frame.batch, sequence=frame.sequence, threads=table.conditions.threads,
    )  # fmt: skip
    points = tuple(
        Point(frame=frame, layers=_layers(arch), ms=one.ms, noise=one.noise, use=job.group.use)
        for arch, one in zip(archs, timed, strict=True)
    )
    return replace(table, points=(*table.points, *points)).refit([frame])


def reference_ms(table: LatencyTable, frame: Frame, body: Body) -> dict[Arch, float]:
    """The references of a frame with their medians in the table; empty while the frame has no points.

    A body other than that the frame was begun with takes points that it can be cut to as well, small to large.

    Raises:
        ModelError: there are points, and the body can be cut to none of them.
    """
    known = {point.layers: point.ms for point in table.points if point.frame == frame}
    own = body.student.arch
    steady = {arch: known[_layers(arch)] for arch in references(own) if _layers(arch) in known}
    if steady or not known:
        return steady
    fitting = sorted((ms, layers) for layers, ms in known.items() if _fits(layers, own))
    if not fitting:
        raise ModelError(
            f"{frame.describe()} was begun with a larger body than {body.name}, and nothing of it can be timed beside "
            "this one: calibrate into another --out"
        )
    chosen = dict.fromkeys([fitting[0], fitting[len(fitting) // 2], fitting[-1]])
    return {_cut_to(layers, own): ms for ms, layers in chosen}


def _fits(layers: Sequence[tuple[int, int, int]], arch: Arch) -> bool:
    own = {layer.source: layer for layer in arch.layers}
    return all(
        source in own and heads <= own[source].heads and neurons <= own[source].neurons
        for source, heads, neurons in layers
    )


def _cut_to(layers: Sequence[tuple[int, int, int]], arch: Arch) -> Arch:
    return replace(
        arch, layers=tuple(Layer(source=source, heads=heads, neurons=neurons) for source, heads, neurons in layers)
    )
