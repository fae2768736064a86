"""What a proxy looks at, on disk: other processes work from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edgekd.files import write_json
from edgekd.search.proxies import ProxyContext
from edgekd.student import load_student
from edgekd.surgery import Importance


def save_evidence(context: ProxyContext, folder: Path, *, auto_class: str) -> Path:
    """Write a proxy's context into a folder and return that.

    Args:
        context: student, teacher, importance and sample.
        folder: where to; what is there is written over.
        auto_class: the transformers class that loads both models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context.student.save(folder / "student")
    same = context.teacher is context.student
    if not same:
        context.teacher.save(folder / "teacher")
    scores, tensors = context.importance, dict[str, torch.Tensor]()
    for name in ("heads", "neurons"):
        tensors |= {f"{name}.{i}": part for i, part in enumerate(getattr(scores, name))}
    tensors |= {"layers": scores.layers} | ({} if scores.hidden is None else {"hidden": scores.hidden})
    for i, (batch, labels) in enumerate(zip(context.batches, context.labels, strict=True)):
        tensors |= {f"batch.{i}.{name}": value for name, value in batch.items()} | {f"label.{i}": labels}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / "evidence.safetensors")
    facts = {
        "layers": len(scores.heads), "batches": len(context.batches), "seed": context.seed, "same": same,
        "auto_class": auto_class,
    }  # fmt: skip
    write_json(folder / "evidence.json", facts)
    return folder


def load_evidence(folder: Path) -> ProxyContext:
    """Read what `save_evidence` wrote."""
    facts: dict[str, Any] = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "evidence.safetensors")
    student = load_student(folder / "student", auto_class=facts["auto_class"])
    same = facts["same"]
    return ProxyContext(
        student=student,
        teacher=student if same else load_student(folder / "teacher", auto_class=facts["auto_class"]),
        importance=Importance(
            heads=tuple(tensors[f"heads.{i}"] for i in range(facts["layers"])),
            neurons=tuple(tensors[f"neurons.{i}"] for i in range(facts["layers"])),
            layers=tensors["layers"],
            hidden=tensors.get("hidden"),
        ),
        batches=[_batch(tensors, f"batch.{i}.") for i in range(facts["batches"])],
        labels=[tensors[f"label.{i}"] for i in range(facts["batches"])],
        seed=facts["seed"],
    )


def _batch(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
