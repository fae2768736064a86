"""Points of a target that is estimated: every shape goes through the vendor's compiler, none is timed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.arch import Arch
from edgekd.calibrate.bodies import Body
from edgekd.calibrate.graphs import DEFAULT_SEQUENCE, build_graphs, example
from edgekd.devices import Estimate, compiler_of
from edgekd.errors import ModelError, StoreError, TargetError
from edgekd.export.lower import NOT_FROM_ONNX
from edgekd.files import sha256_json
from edgekd.latency.cell import Frame
from edgekd.latency.table import LatencyTable, Point
from edgekd.surgery import cut
from edgekd.target import Target

if TYPE_CHECKING:
    from edgekd.export.tflite import Converter

SECONDS = 1200.0
"""How long one compilation may take."""


class Estimator:
    """Builds shapes in a target's form and compiles them; use it with `with`, it may keep a converter running.

    With `models`, what was built is kept in that folder and taken from there the next time: compilers differ, the
    models they get for one form do not.
    """

    def __init__(self, target: Target, work: Path, models: Path | None = None) -> None:
        self.target, self.work, self.models = target, work, models
        self._stack = contextlib.ExitStack()
        self._converter: Converter | None = None

    def __enter__(self) -> Estimator:
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()

    def __call__(self, body: Body, arch: Arch, frame: Frame) -> Estimate:
        """The vendor's estimate of one shape.

        Raises:
            ModelError: the compiler refuses it.
            TargetError: it takes too long.
        """
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            folder = Path(name)
            model = self._model(body, arch, frame, folder)
            (folder / "out").mkdir()
            return compiler_of(self.target).compile(self.target, model, folder / "out", timeout=SECONDS)

    def _model(self, body: Body, arch: Arch, frame: Frame, folder: Path) -> Path:
        suffix = ".tflite" if frame.lowering in NOT_FROM_ONNX else ".onnx"
        if self.models is not None:
            layers = [[layer.source, layer.heads, layer.neurons] for layer in arch.layers]
            config = body.student.model.config.to_json_string(use_diff=False)
            key = sha256_json([config, body.image, vars(frame), layers, self.target.symmetric])
            self.models.mkdir(parents=True, exist_ok=True)
            kept = self.models / f"{key[:24]}{suffix}"
            if kept.is_file():
                return kept
        draft = folder / f"model{suffix}"
        if suffix == ".tflite":
            self._tflite(body, arch, frame, draft)
        else:
            build_graphs(body, arch, {draft: frame}, static=True, symmetric=self.target.symmetric)
        if self.models is None:
            return draft
        # Another calibration may use the same folder: whole files only, under names of their own until then.
        own = kept.with_name(f".{kept.name}.{os.getpid()}")
        shutil.copyfile(draft, own)
        return own.replace(kept)

    def _tflite(self, body: Body, arch: Arch, frame: Frame, output: Path) -> None:
        from edgekd.export.tflite import Converter, export_tflite

        if self._converter is None:
            self._converter = self._stack.enter_context(Converter())
        feeds = example(body, batch=frame.batch, sequence=frame.sequence or DEFAULT_SEQUENCE)
        export_tflite(
            cut(body.student, arch, body.importance), body.task, [feeds], output, batch=frame.batch,
            sequence=None if body.image else frame.sequence, converter=self._converter,
        )  # fmt: skip


def estimated_points(
    shapes: Sequence[tuple[Arch, Frame]],
    body: Body,
    known: Set[Any],
    use: str,
    estimator: Estimator,
    *,
    end: float,
    say: Callable[[str], None],
) -> Iterator[tuple[Point, Estimate]]:
    """Compile each shape in each frame that lacks it, one after the other; what the compiler refuses is told to `say`.

    A table does without a shape that cannot be compiled: neither could a student of that shape be.
    """
    for arch, frame in shapes:
        layers = tuple((layer.source, layer.heads, layer.neurons) for layer in arch.layers)
        if (frame, layers) not in known and time.monotonic() < end:
            try:
                found = estimator(body, arch, frame)
            except (ModelError, TargetError) as error:
                say(f"left out, the compiler refuses {arch.describe()}: {error}")
                continue
            yield Point(frame=frame, layers=layers, ms=found.ms, use=use), found


def with_point(table: LatencyTable, point: Point, found: Estimate) -> LatencyTable:
    """The table with one more point; what the estimate depends on goes into its conditions.

    Raises:
        StoreError: the points before were estimated with other options or versions.
    """
    was, now = dict(table.conditions.options), dict(found.options)
    if table.points and was != now:
        changed = ", ".join(f"{key}: {was.get(key)} before, {now.get(key)} now" for key in {**was, **now}
                            if was.get(key) != now.get(key))  # fmt: skip
        raise StoreError(f"the table was begun under other conditions ({changed}): choose another --out, or --fresh")
    conditions = replace(table.conditions, options=dict(found.options), caveat=found.caveat)
    return replace(table, conditions=conditions, points=(*table.points, point))
