"""What every stage is handed besides the student: the teacher, the encoded data, the device and the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edgekd.arch import Arch
    from edgekd.student import Student
    from edgekd.target import Target
    from edgekd.tasks import Encoded, Task


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the artifact must satisfy.

    `latency_p95_ms` in milliseconds or `speedup` as a ratio of medians over the fp32 teacher in ONNX Runtime, at
    `batch` and `sequence` tokens on `threads` threads; `accuracy_drop` and `min_accuracy` as fractions (0.02 is two
    points); `size_mb` in 10^6 bytes of the ONNX file.
    """

    latency_p95_ms: float | None = None
    speedup: float | None = None
    batch: int = 1
    sequence: int = 64
    threads: int | None = None
    size_mb: float | None = None
    accuracy_drop: float | None = None
    min_accuracy: float | None = None

    @property
    def asks_latency(self) -> bool:
        """Whether the budget limits the latency at all."""
        return self.latency_p95_ms is not None or self.speedup is not None


class Progress(Protocol):
    """Where a stage reports what it does; the terminal, or nothing."""

    def start(self, description: str, total: int) -> None:
        """Begin a bar of `total` steps."""

    def advance(self, steps: int = 1, **metrics: float) -> None:
        """Move the bar and show the latest metrics."""

    def stop(self) -> None:
        """End the bar."""

    def say(self, text: str) -> None:
        """Print one line."""


class Silent:
    """A `Progress` that shows nothing."""

    def start(self, description: str, total: int) -> None:
        """Ignore."""

    def advance(self, steps: int = 1, **metrics: float) -> None:
        """Ignore."""

    def stop(self) -> None:
        """Ignore."""

    def say(self, text: str) -> None:
        """Ignore."""


def as_it_is(arch: Arch) -> Arch:
    """The same shape."""
    return arch


@dataclass(frozen=True, kw_only=True)
class Context:
    """The surroundings of one stage.

    `work` is the stage's scratch folder, which survives a kill so that the stage can go on where it was; `cache`
    holds what several stages and rounds share (teacher outputs, latency tables). `teacher_graph` is the teacher as
    float32 ONNX. `lowering` is the form in which the artifact is expected to ship, so that search can predict its
    latency, and `reshape` what the operators stage will make of a shape. `strictness` is at most 1: the part of the
    budget that is left after earlier rounds missed it. What a stage adds to `notes` goes into the ledger.
    """

    teacher: Student
    task: Task
    processor: Any
    train: Encoded
    validation: Encoded
    test: Encoded | None
    target: Target
    budget: Budget
    work: Path
    cache: Path
    progress: Progress
    teacher_graph: Path | None = None
    lowering: str = "fp32"
    seed: int = 0
    strictness: float = 1.0
    reshape: Callable[[Arch], Arch] = as_it_is
    notes: dict[str, Any] = field(default_factory=dict)
