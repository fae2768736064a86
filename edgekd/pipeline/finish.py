"""The end of the way: the final artifact, its quality, the verdict, the manifest."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__
from edgekd.context import Budget
from edgekd.export.bundle import ARTIFACT, assemble, seal
from edgekd.export.lower import NOT_FROM_ONNX
from edgekd.export.onnx import export_float
from edgekd.export.operators import needs
from edgekd.export.sparse import compress, compressed_bytes
from edgekd.families.zeros import count_zeros
from edgekd.files import sha256_file
from edgekd.latency.bench import Settings
from edgekd.latency.estimate import described
from edgekd.latency.stats import Measurement
from edgekd.latency.verdict import FAIL, INCONCLUSIVE, Verdict
from edgekd.pipeline.artifact import Artifact, Place, build, timed, write
from edgekd.pipeline.baseline import Baseline, quality
from edgekd.pipeline.gauge import Gauged, Teacher, gauge, shipping_forms
from edgekd.pipeline.setup import Setup
from edgekd.pipeline.sides import in_flash
from edgekd.report.card import model_card
from edgekd.student import Student
from edgekd.target import Target

LOOK = Settings(blocks=120, max_seconds=60)
"""The first look at the artifact's latency; further ones double the number of samples."""
CHOICE = Settings(blocks=60)
"""How long the float forms of a student are measured to choose between them."""
DEVICE = "device"
"""Folder of a bundle with what a vendor's compiler made for the device."""
PACKAGES = ("torch", "transformers", "optimum", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An artifact with what is known of its latency, and its quality."""

    artifact: Artifact
    gauged: Gauged
    verdict: Verdict
    quality: Mapping[str, Any]
    accuracy_met: bool

    @property
    def measurement(self) -> Measurement:
        """Its latency."""
        return self.gauged.measurement


def final_artifact(student: Student, setup: Setup, target: Target, budget: Budget, folder: Path) -> Artifact:
    """Build the file that ships.

    A float student takes the form that is measured to be fastest, or the target's first where none can be measured;
    a target without a float form takes its first with ranges calibrated here.
    """
    own = setup.for_student(student)
    place = Place(target=target, budget=budget, calibration=own.train)
    forms = shipping_forms(student, target)
    if len(forms) == 1:
        return build(student, own.task, own.validation, folder, lowering=forms[0], place=place)
    built = [build(student, own.task, own.validation, folder / form, lowering=form, place=place) for form in forms]
    samples = timed([form.file for form in built], target, budget, CHOICE)
    return built[int(np.argmin([np.median(sample.ms) for sample in samples]))]


def judged(
    artifact: Artifact, student: Student, setup: Setup, base: Baseline, target: Target, budget: Budget, folder: Path
) -> Judged:
    """Gauge a student's artifact beside the teacher, and score it; what a vendor's compiler makes goes into `folder`.

    The student reads the texts with its own tokenizer, the teacher with the teacher's.
    """
    own = setup.for_student(student)

    def in_form() -> Path:
        place = Place(target=target, budget=budget, calibration=setup.train)
        work = folder / "teacher"
        work.mkdir(parents=True, exist_ok=True)
        graph = None
        if artifact.lowering not in NOT_FROM_ONNX:
            graph = export_float(setup.teacher, setup.task.name, work / "float.onnx")
        return write(setup.teacher, setup.task, graph, artifact.lowering, work, place)

    teacher = Teacher(graph=base.graph, in_form=in_form)
    gauged = gauge(artifact, target, budget, folder / "device", teacher=teacher, look=LOOK)
    verdict = with_size(gauged.verdict, artifact.file.stat().st_size, budget)
    scored = quality(own, artifact.file)
    scored["retained"] = scored["value"] / base.reported if base.reported else None
    return Judged(
        artifact=artifact,
        gauged=gauged,
        verdict=verdict,
        quality=scored,
        accuracy_met=scored["value"] >= accuracy_floor(base, budget),
    )


def with_size(verdict: Verdict, size_bytes: int, budget: Budget) -> Verdict:
    """The verdict with the size budget judged too."""
    if budget.size_mb is None:
        return verdict
    size = size_bytes / 1e6
    met = size <= budget.size_mb
    reason = (
        f"{verdict.reason}; size {size:.2f} MB is {'within' if met else 'over'} the budget of {budget.size_mb:g} MB"
    )
    return replace(verdict, reason=reason, status=verdict.status if met else FAIL)


def accuracy_floor(base: Baseline, budget: Budget) -> float:
    """The least metric allowed on the reported split; minus infinity if none was asked."""
    if budget.min_accuracy is not None:
        return budget.min_accuracy
    return base.reported - budget.accuracy_drop if budget.accuracy_drop is not None else float("-inf")


def exit_code(judgements: list[Judged]) -> int:
    """0 all met, 3 a latency or size budget missed, 4 an accuracy floor missed, 5 inconclusive."""
    statuses = [judgement.verdict.status for judgement in judgements]
    if FAIL in statuses:
        return 3
    if not all(judgement.accuracy_met for judgement in judgements):
        return 4
    return 5 if INCONCLUSIVE in statuses else 0


def write_bundle(
    folder: Path,
    judgement: Judged,
    student: Student,
    setup: Setup,
    base: Baseline,
    *,
    ledger: list[dict[str, Any]],
    rounds: list[dict[str, Any]],
    recipe_hash: str,
    seed: int,
    budget: Budget,
) -> dict[str, Any]:
    """Write the bundle folder and return its manifest."""
    layout(folder, judgement.artifact, student, judgement.gauged)
    manifest: dict[str, Any] = {
        "edgekd": __version__,
        "task": setup.task.name,
        "labels": [name for _, name in sorted(student.model.config.id2label.items())],
        **({"max_length": setup.max_length} if setup.max_length is not None else {}),
        "teacher": {
            "metric": setup.metric,
            "value": base.reported,
            "n": base.n,
            "p50_ms": judgement.measurement.teacher_p50_ms,
            "size_bytes": base.size_bytes,
        },
        "artifact": artifact_section(judgement.artifact, student, folder, judgement.gauged),
        "quality": dict(judgement.quality),
        "budget": {key: value for key, value in vars(budget).items() if value is not None},
        "latency": [judgement.measurement.to_dict()],
        **estimate_section(judgement.gauged),
        "verdict": [judgement.verdict.to_dict()],
        "accuracy_floor_met": judgement.accuracy_met,
        "ledger": ledger,
        "rounds": rounds,
        "versions": versions(),
        "seeds": {"run": seed},
        "recipe": recipe_hash,
    }
    seal(folder, manifest, model_card(manifest))
    return manifest


def layout(folder: Path, artifact: Artifact, student: Student, gauged: Gauged) -> None:
    """Lay the bundle out: the artifact, what the vendor's compiler made of it under `device/`, config and processor.

    Where the device stores the compressed file, that is beside the artifact.
    """
    place = place_of(artifact)
    assemble(folder, artifact=artifact.file, student=student, place=place)
    if (student.sparsity or {}).get("storage") == "compressed":
        compress(folder / place, folder / f"{place}.gz")
    for file in device_files(gauged):
        (folder / DEVICE).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / DEVICE / file.name)


def place_of(artifact: Artifact) -> str:
    """Where in a bundle the artifact is: `onnx/model.onnx` or `tflite/model.tflite`."""
    return ARTIFACT if artifact.file.suffix == ".onnx" else f"{artifact.file.suffix[1:]}/model{artifact.file.suffix}"


def device_files(gauged: Gauged) -> tuple[Path, ...]:
    """What the vendor's compiler made for the device."""
    return gauged.estimates["model"].files if gauged.estimates else ()


def artifact_section(artifact: Artifact, student: Student, folder: Path, gauged: Gauged) -> dict[str, Any]:
    """What the manifest says of the artifact in `folder`."""
    name = place_of(artifact)
    file, parity = folder / name, artifact.float_parity
    device = [f"{DEVICE}/{made.name}" for made in device_files(gauged)]
    return {
        "file": name,
        "sha256": sha256_file(file),
        "size_bytes": file.stat().st_size,
        "compressed_bytes": compressed_bytes(file),
        **(in_flash(gauged.estimates["model"]) if gauged.estimates else {}),
        **_sparse(student, folder, name),
        "precision": artifact.precision,
        "lowering": artifact.lowering,
        "opset": opset_of(file),
        **({"needs": needs(file)} if file.suffix == ".onnx" else {}),
        "shape": student.arch.describe(),
        **({"fixed": artifact.shapes} if artifact.shapes else {}),
        **({"device": device} if device else {}),
        "parity": {"float": parity and parity.to_dict(), "shipped": artifact.parity.to_dict()},
    }


def _sparse(student: Student, folder: Path, name: str) -> dict[str, Any]:
    """Pattern and share of the zeros of a sparse student, and its compressed file if there is one."""
    if student.sparsity is None:
        return {}
    zeros, weights = count_zeros(student.model, student.sparsity)
    said: dict[str, Any] = {"pattern": student.sparsity["pattern"], "zeros": zeros, "of": weights}
    packed = {"compressed": f"{name}.gz"} if (folder / f"{name}.gz").is_file() else {}
    return {"sparsity": said, **packed}


def opset_of(file: Path) -> int | None:
    """The version of the standard operators an ONNX file uses; None for what is not ONNX."""
    import onnx

    if file.suffix != ".onnx":
        return None
    imports = onnx.load(str(file), load_external_data=False).opset_import
    return max((int(each.version) for each in imports if each.domain in ("", "ai.onnx")), default=None)


def estimate_section(gauged: Gauged) -> dict[str, Any]:
    """All that a vendor's compiler says, with the options it was asked with; nothing for other targets."""
    if not gauged.estimates:
        return {}
    names = {"model": "artifact", "baseline": "teacher"}
    said = {names[name]: described(each, None) for name, each in gauged.estimates.items()}
    # What was made for the device is named in `artifact.device`; the teacher's files do not ship.
    return {"estimate": {name: {k: v for k, v in each.items() if k != "files"} for name, each in said.items()}}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the artifact."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
