"""Training a student that is already quantized: the rounding stays on while it becomes sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.quantize.fake import Scheme
from edgekd.quantize.fake.installed import FakeQuantized, install
from edgekd.student import Student
from edgekd.surgery.replay import Batch


@dataclass(frozen=True)
class Rounding:
    """The fake quantization around a model's masks: it rounds what they leave, and zero to zero."""

    quantized: FakeQuantized

    def strip(self) -> dict[str, Any]:
        """Take it off again; what `Student.quantization` says of it anew."""
        self.quantized.freeze()
        found = {"activations": self.quantized.ranges(), "attention": self.quantized.attention_ranges()}
        self.quantized.strip()
        return {key: {name: list(pair) for name, pair in ranges.items()} for key, ranges in found.items() if ranges}


def under_rounding(student: Student, batches: Sequence[Batch]) -> Rounding | None:
    """Put the rounding that the student was trained under on its model, masks included; None if it was not.

    Ranges start where that training left them.
    """
    stated = student.quantization or {}
    if "scheme" not in stated:
        return None
    quantized = install(
        student.model,
        Scheme.from_dict(stated["scheme"]),
        observer=stated.get("observer", "minmax"),
        learned=stated.get("learned", False),
    )
    quantized.calibrate(batches)
    quantized.take({**stated.get("activations", {}), **stated.get("attention", {})})
    return Rounding(quantized)
