"""What one profile runs: models with their inputs, on one target, with the same threads and session options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.devices import Operator
from edgekd.errors import ModelError, unknown
from edgekd.latency import bench
from edgekd.latency.artifact import Artifact
from edgekd.latency.bench import Settings, Subject
from edgekd.latency.feeds import check_feeds, graph_inputs, read_feeds, resized, synthesize
from edgekd.latency.stats import Samples
from edgekd.target import Target


@dataclass(frozen=True, kw_only=True)
class Fed:
    """A model with inputs; `batch` and `sequence` are None where the inputs were given and are not known."""

    subject: Subject
    batch: int | None = None
    sequence: int | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Where and with what models are run; `folder` takes the inputs that are made up.

    `batch`, `sequence`, `shapes`, `values` and `seed` choose them (see `edgekd.latency.feeds`), unless `feeds` names
    an .npz file. `session` holds session options over those a model ships with; `cpus` the ones to stay on.
    """

    target: Target
    folder: Path
    batch: int | None = None
    sequence: int | None = None
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    feeds: Path | None = None
    session: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def check(self, models: Sequence[Artifact]) -> None:
        """See that every input named in `shapes` and `values` is one of some model's, and that `feeds` fit them all.

        Raises:
            ModelError: they do not, or a model or the inputs cannot be read.
        """
        if self.feeds is not None:
            feeds = read_feeds(self.feeds)
            for model in models:
                check_feeds(model.path, feeds, self.feeds)
        if self.shapes or self.values:
            names = {item.name for model in models for item in graph_inputs(model.path)}
            for option, given in (("--shape", self.shapes), ("--value", self.values)):
                for name in given:
                    if name not in names:
                        raise ModelError(f"{option}: {unknown('input', name, names)}")

    def feed(self, name: str, model: Artifact, *, batch: int | None = None, sequence: int | None = None) -> Fed:
        """Give a model its inputs, of another batch or sequence length than the workload's if asked.

        Raises:
            ModelError: the inputs cannot be made, or not of that size.
        """
        subject = Subject(name=name, path=model.path, options=self._options(model), feeds=self.feeds)
        if self.feeds is not None:
            return Fed(subject=subject)
        names = {item.name for item in graph_inputs(model.path)}
        shapes = {key: shape for key, shape in self.shapes.items() if key in names}
        made = synthesize(
            model.path,
            batch=batch or self.batch,
            sequence=sequence or self.sequence,
            shapes=resized(model.path, shapes, batch=batch, sequence=sequence),
            values={key: value for key, value in self.values.items() if key in names},
            seed=self.seed,
        )
        if batch is not None and made.batch != batch:
            raise ModelError("the model has no batch dimension")
        if sequence is not None and made.sequence != sequence:
            raise ModelError("the model has no sequence dimension")
        file = self.folder / f"inputs-{len(list(self.folder.glob('inputs-*')))}.npz"
        arrays: dict[str, Any] = dict(made.arrays)
        np.savez(file, **arrays)
        return Fed(subject=replace(subject, feeds=file), batch=made.batch, sequence=made.sequence)

    def measure(self, models: Sequence[Fed], settings: Settings) -> list[Samples]:
        """Time models in turns; as `edgekd.latency.bench.measure`."""
        taken = bench.measure([model.subject for model in models], settings=settings, **self._place())
        return [
            part if model.batch is None else replace(part, batch=model.batch, sequence=model.sequence)
            for model, part in zip(models, taken, strict=True)
        ]

    def operators(self, model: Fed) -> Sequence[Operator]:
        """Where the operators of a model run and how long they take; as `edgekd.latency.bench.trace_operators`."""
        return bench.trace_operators(model.subject, **self._place())

    def _place(self) -> dict[str, Any]:
        place: dict[str, Any] = {"target": self.target, "batch": None, "threads": self.threads}
        return {**place, "cpus": self.cpus} if self.cpus else place

    def _options(self, model: Artifact) -> dict[str, Any]:
        config = {**model.options.get("config", {}), **self.session.get("config", {})}
        return {**model.options, **self.session, **({"config": config} if config else {})}
