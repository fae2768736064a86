"""A student before and after a stage, both in the form they would ship in, and what is known of these two files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.context import Budget
from edgekd.devices import Estimate, is_estimated, unavailable
from edgekd.errors import ModelError, StageError
from edgekd.export.lower import precision_of
from edgekd.export.parity import Logits, torch_logits
from edgekd.export.sparse import compressed_bytes
from edgekd.files import sha256_file
from edgekd.latency.artifact import Artifact as Model
from edgekd.latency.bench import Settings
from edgekd.latency.estimate import estimate
from edgekd.latency.plain import plain
from edgekd.latency.stats import VERDICT, Samples, join, ratio_interval, summarize
from edgekd.pipeline.artifact import Artifact, Place, build, timed
from edgekd.pipeline.gauge import shipping_forms
from edgekd.pipeline.setup import Setup
from edgekd.quantize.forms import form_logits
from edgekd.student import Student
from edgekd.target import Target
from edgekd.tasks import Encoded, correct, score_interval

Hits = np.ndarray[Any, np.dtype[np.bool_]]

LEDGER = Settings(blocks=40)
"""How long both sides of a stage are measured; the verdict on the whole measures for longer."""
CLEAR = 0.95
"""Where two models lie in memory moved the ratio of two equal ones by up to 2 %, with certainty as far as one process
can tell; a ratio certainly below this cannot come from that."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What weighs students: data, teacher, target and budget. `known` keeps what a file once told."""

    setup: Setup
    target: Target
    budget: Budget
    teacher_graph: Path
    known: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: latency as it stands in the ledger, size, metric on validation with its 95 % interval (Wilson).

    `compressed_bytes` is the file after deflate, `flash_bytes` what a vendor's compiler made of it for the device and
    `encoded_bytes` the weights therein, if it says so; `storage` is what the device keeps, `dense` or `compressed`.
    `divergence` is the mean KL divergence of its answers from the teacher's on validation, in nats. None: not known,
    because nothing could be made for the target; `problem` says why, also where its compiler refuses what was made.
    `metric_change_ci95` is the 95 % interval of the share of examples that the later side gets right and the earlier
    one wrong, less the other way round (`paired_interval`); the earlier side has none.
    """

    shape: str
    lowering: str
    precision: str
    latency: Mapping[str, Any]
    size_bytes: int | None = None
    compressed_bytes: int | None = None
    flash_bytes: int | None = None
    encoded_bytes: int | None = None
    storage: str = ""
    metric: float | None = None
    metric_ci95: tuple[float, float] | None = None
    metric_change_ci95: tuple[float, float] | None = None
    divergence: float | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What the ledger says of it; what is not known is left out."""
        known = {key: value for key, value in vars(self).items() if value not in (None, "")}
        return {key: value if key == "metric" else plain(value) for key, value in known.items()}


@dataclass(frozen=True, kw_only=True)
class _Built:
    """The candidates of one side: what a student may ship as, or why there is none."""

    student: Student
    own: Setup
    artifacts: tuple[Artifact, ...]
    problem: str = ""


def weigh(scale: Scale, before: Student, after: Student, folder: Path) -> tuple[Side, Side]:
    """Build and compare two students; latencies that can be measured come of one run with the teacher in between.

    A student without quantization may ship in several float forms: the fastest of them counts, on both sides. It is
    not held to what a file of lower precision must agree on, as it has yet to be trained or quantized.

    Raises:
        StageError: a float32 graph of the later student does not say what the torch model says.
        TargetError, StoreError: as building, compiling and measuring raise them; they tell nothing of the student.
    """
    built = [_build(scale, before, folder / "before"), _build(scale, after, folder / "after", strict=True)]
    places, latencies = _latencies(scale, built, folder)
    sides = [_side(scale, each, place, dict(said)) for each, place, said in zip(built, places, latencies, strict=True)]
    hits = [_hits(scale, each, place) for each, place in zip(built, places, strict=True)]
    if hits[0] is None or hits[1] is None:
        return sides[0], sides[1]
    return sides[0], replace(sides[1], metric_change_ci95=paired_interval(hits[0], hits[1]))


def _build(scale: Scale, student: Student, folder: Path, *, strict: bool = False) -> _Built:
    own, forms = scale.setup.for_student(student), shipping_forms(student, scale.target)
    place = Place(target=scale.target, budget=scale.budget, calibration=own.train)
    artifacts: list[Artifact] = []
    try:
        for form in forms:
            gate = student.quantization is not None
            made = build(student, own.task, own.validation, folder / form, lowering=form, place=place, gate=gate)
            artifacts.append(made)
    except (ModelError, StageError) as error:
        if strict and isinstance(error, StageError) and precision_of(forms[0]) == "fp32":
            raise
        return _Built(student=student, own=own, artifacts=(), problem=str(error))
    return _Built(student=student, own=own, artifacts=tuple(artifacts))


def _latencies(scale: Scale, built: list[_Built], folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """Which candidate counts on each side, and the latency of each."""
    if reason := unavailable(scale.target):
        return [0, 0], [_unknown(each.problem or reason) for each in built]
    if is_estimated(scale.target):
        said = [_estimated(scale, each, folder / f"device-{index}") for index, each in enumerate(built)]
        return [0, 0], _with_ratio(said)
    return _measured(scale, built)


def _measured(scale: Scale, built: list[_Built]) -> tuple[list[int], list[dict[str, Any]]]:
    """The teacher and all candidates in turns in one run; of each side the fastest goes on.

    A gain that memory placement alone could make is looked at again in a fresh process; its interval then spans both.
    """
    files = [artifact.file for each in built for artifact in each.artifacts]
    teacher, *taken = timed([scale.teacher_graph, *files], scale.target, scale.budget, LEDGER)
    places, best = [], list[Samples | None]()
    for each in built:
        own, taken = taken[: len(each.artifacts)], taken[len(each.artifacts) :]
        places.append(int(np.argmin([np.median(samples.ms) for samples in own])) if own else 0)
        best.append(own[places[-1]] if own else None)
    before, after = best
    if before is None or after is None:
        return places, [_unknown(each.problem) if one is None else _figures(scale, one, teacher)
                        for each, one in zip(built, best, strict=True)]  # fmt: skip
    pair = [each.artifacts[place].file for each, place in zip(built, places, strict=True)]
    ratio = _ratio(before, after, pair)
    if CLEAR < ratio["ratio_ci99"][1] < 1:
        again = timed([scale.teacher_graph, *pair], scale.target, scale.budget, replace(LEDGER, seed=1))
        second = _ratio(again[1], again[2], pair)["ratio_ci99"]
        teacher, before, after = (join(each) for each in zip((teacher, before, after), again, strict=True))
        first = ratio["ratio_ci99"]
        ratio = {**_ratio(before, after, pair), "ratio_ci99": [min(first[0], second[0]), max(first[1], second[1])]}
    return places, [_figures(scale, before, teacher), {**_figures(scale, after, teacher), **ratio}]


def _ratio(before: Samples, after: Samples, files: Sequence[Path]) -> dict[str, Any]:
    """Median after over median before with its 99 % interval; 1 without doubt for two files of the same bytes."""
    if sha256_file(files[0]) == sha256_file(files[1]):
        return {"ratio": 1.0, "ratio_ci99": [1.0, 1.0]}
    ratio = float(np.median(after.ms) / np.median(before.ms))
    found: dict[str, Any] = plain({"ratio": ratio, "ratio_ci99": ratio_interval(after, before, level=VERDICT)})
    return found


def _figures(scale: Scale, samples: Samples, teacher: Samples) -> dict[str, Any]:
    measurement = summarize(samples, target=scale.target.name, baseline=teacher)
    names = ("kind", "p50_ms", "ci95_ms", "p95_ms", "n", "teacher_p50_ms", "speedup")
    figures: dict[str, Any] = plain({name: getattr(measurement, name) for name in names})
    return figures


def _unknown(reason: str) -> dict[str, Any]:
    return {"kind": "unavailable", "reason": reason}


def _estimated(scale: Scale, each: _Built, folder: Path) -> dict[str, Any]:
    """What the vendor's compiler says; of the same file it is asked once."""
    if not each.artifacts:
        return _unknown(each.problem)
    file = each.artifacts[0].file
    name = f"estimate-{sha256_file(file)}"
    if name not in scale.known:
        try:
            measurement, made = estimate(scale.target, {"model": Model(file)}, folder)
            scale.known[name] = {"kind": measurement.kind, "p50_ms": measurement.p50_ms, **in_flash(made["model"])}
        except (ModelError, StageError) as error:
            scale.known[name] = {**_unknown(str(error)), "problem": str(error)}
    return dict(scale.known[name])


def in_flash(made: Estimate) -> dict[str, int]:
    """`flash_bytes`: all files made for the device; `encoded_bytes`: its weights, where the compiler tells them."""
    encoded = made.figures.get("total_npu_encoded_weights")
    files = sum(file.stat().st_size for file in made.files)
    return {**({"flash_bytes": files} if files else {}), **({} if encoded is None else {"encoded_bytes": int(encoded)})}


def _with_ratio(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    before, after = (each.get("p50_ms") for each in said)
    return [said[0], {**said[1], **({"ratio": plain(after / before)} if before and after else {})}]


def _side(scale: Scale, each: _Built, place: int, latency: dict[str, Any]) -> Side:
    shape = each.student.arch.describe()
    if not each.artifacts:
        form = shipping_forms(each.student, scale.target)[0]
        return Side(shape=shape, lowering=form, precision=precision_of(form), latency=latency, problem=each.problem)
    artifact, labels = each.artifacts[place], each.own.validation.labels
    logits, hits = _logits(scale, artifact.file, each.own.validation), _hits(scale, each, place)
    return Side(
        shape=shape,
        lowering=artifact.lowering,
        precision=artifact.precision,
        latency=latency,
        size_bytes=artifact.file.stat().st_size,
        compressed_bytes=_compressed(scale, artifact.file),
        flash_bytes=latency.pop("flash_bytes", None),
        encoded_bytes=latency.pop("encoded_bytes", None),
        storage=str((each.student.sparsity or {}).get("storage", "")),
        metric=None if labels is None else each.own.task.score(logits, labels),
        metric_ci95=None if hits is None else score_interval(hits),
        divergence=divergence(_teacher_logits(scale), logits),
        problem=str(latency.pop("problem", "")),
    )


def _compressed(scale: Scale, file: Path) -> int:
    name = f"compressed-{sha256_file(file)}"
    if name not in scale.known:
        scale.known[name] = compressed_bytes(file)
    return int(scale.known[name])


def _hits(scale: Scale, each: _Built, place: int) -> Hits | None:
    """Which of the labelled validation examples the artifact gets right; None if that is not known."""
    labels = each.own.validation.labels
    if not each.artifacts or labels is None:
        return None
    return correct(_logits(scale, each.artifacts[place].file, each.own.validation), labels)


def paired_interval(before: Hits, after: Hits) -> tuple[float, float]:
    """95 % interval of the change in accuracy between two answers to the same examples, from hits [N] of each.

    Only examples that one of the two gets right tell anything (McNemar 1947, doi:10.1007/BF02295996): Wilson's interval
    of the later one's share of those, as a difference. It holds 0 where McNemar's test sees no difference.
    """
    differ = before != after
    if not differ.any():
        return 0.0, 0.0
    low, high = score_interval(after[differ])
    share = float(differ.mean())
    return (2 * low - 1) * share, (2 * high - 1) * share


def _logits(scale: Scale, file: Path, encoded: Encoded) -> Logits:
    """Of the same file and examples they are computed once: what is after one stage is before the next."""
    name = f"logits-{sha256_file(file)}-{encoded.fingerprint}"
    if name not in scale.known:
        scale.known[name] = form_logits(file, encoded)
    logits: Logits = scale.known[name]
    return logits


def _teacher_logits(scale: Scale) -> Logits:
    if "teacher" not in scale.known:
        scale.known["teacher"] = torch_logits(scale.setup.teacher.model, scale.setup.validation)
    logits: Logits = scale.known["teacher"]
    return logits


def divergence(teacher: Logits, student: Logits) -> float:
    """Mean KL(teacher ‖ student) over examples, from logits `[N, C]`, in nats."""
    reference, own = (_log_softmax(logits.astype(np.float64)) for logits in (teacher, student))
    return float((np.exp(reference) * (reference - own)).sum(axis=-1).mean())


def _log_softmax(logits: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray[Any, np.dtype[np.float64]] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
