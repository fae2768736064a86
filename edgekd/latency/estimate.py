"""The latency a vendor's compiler states for a model: named for what it is, and never mixed with measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd.devices import Estimate, compiler_of
from edgekd.errors import ModelError
from edgekd.latency.artifact import Artifact
from edgekd.latency.feeds import graph_inputs
from edgekd.latency.plain import plain
from edgekd.latency.stats import Measurement
from edgekd.target import Target

TIMEOUT = 1800.0


def estimate(
    target: Target,
    models: Mapping[str, Artifact],
    folder: Path,
    *,
    timeout: float = TIMEOUT,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Measurement, dict[str, Estimate]]:
    """Compile the models (`model`, perhaps `baseline`) into `folder` and return what the compiler says of them.

    The measurement is the model's; one figure, so it stands as p50 and no other percentile is known.

    Raises:
        ModelError: a model has free dimensions where the target needs fixed ones, or does not compile.
        TargetError: compiling takes longer than `timeout` seconds.
    """
    estimates = {}
    for name, model in models.items():
        require_static(model.path, target)
        place = folder if name == "model" else folder / name
        place.mkdir(parents=True, exist_ok=True)
        say(f"compiling {model.path} for {target.name}")
        estimates[name] = compiler_of(target).compile(target, model.path, place, timeout=timeout)
    own, other = estimates["model"], estimates.get("baseline")
    batch, sequence = fixed_sizes(models["model"].path)
    measurement = Measurement(
        target=target.name, kind="vendor_estimate", batch=batch, sequence=sequence, p50_ms=own.ms,
        throughput=1000.0 * batch / own.ms, notes=tuple(note for note in (own.caveat, *own.notes) if note),
    )  # fmt: skip
    if other is not None:
        measurement = replace(measurement, teacher_p50_ms=other.ms, speedup=other.ms / own.ms)
    return measurement, estimates


def require_static(path: Path, target: Target) -> None:
    """Refuse an ONNX file with free dimensions on a target that needs fixed ones.

    Raises:
        ModelError: it has some; the message says how to make a file without.
    """
    if target.shapes != "static" or path.suffix != ".onnx":
        return
    free = {
        f"{item.name}: {dim or '?'}" for item in graph_inputs(path) for dim in item.shape if not isinstance(dim, int)
    }
    if free:
        raise ModelError(
            f"{path} leaves dimensions open ({', '.join(sorted(free))}), but {target.name} needs fixed ones: "
            f"make a bundle for it with `edgekd export STUDENT --target {target.name} …` and profile that"
        )


def fixed_sizes(path: Path) -> tuple[int, int | None]:
    """Batch and sequence length of an ONNX file with fixed shapes; 1 and None for what is not ONNX."""
    if path.suffix != ".onnx":
        return 1, None
    shapes = {item.name: item.shape for item in graph_inputs(path)}
    tokens = shapes.get("input_ids")
    first = tokens or next(iter(shapes.values()), ())
    batch = first[0] if first else 1
    length = tokens[1] if tokens is not None and len(tokens) > 1 else None
    return batch if isinstance(batch, int) else 1, length if isinstance(length, int) else None


def described(own: Estimate, folder: Path | None) -> dict[str, Any]:
    """An estimate as plain data, its files relative to `folder` (None: they are not kept)."""
    known = {key: plain(getattr(own, key)) for key in ("ms", "low_ms", "high_ms", "cycles", "caveat")}
    files = [str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file) for file in own.files] \
        if folder else []  # fmt: skip
    figures = {key: plain(value) for key, value in own.figures.items()}
    return {**known, "figures": figures, "options": dict(own.options), "files": files, "notes": list(own.notes)}
