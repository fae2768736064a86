"""Does the ONNX graph say what the torch model says? Checked on real examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import StageError

if TYPE_CHECKING:
    from edgekd.tasks import Encoded

Logits = npt.NDArray[np.float32]

TOLERANCE = 1e-3
"""Largest difference of a float graph's logits, relative to the spread of the torch logits."""
AGREEMENT = {"fp32": 0.995, "fp16": 0.98, "bf16": 0.95, "int8": 0.8, "int4": 0.8}
"""Least share of equal predictions by precision; int8 is held to its accuracy, this only catches a broken graph."""


@dataclass(frozen=True)
class Parity:
    """`max_abs` difference of logits, share of equal predictions, and how many examples were compared."""

    max_abs: float
    agreement: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """For the manifest."""
        return {"max_abs": self.max_abs, "agreement": self.agreement, "n": self.n}


def onnx_logits(file: Path, encoded: Encoded, *, batch_size: int = 1, threads: int = 0) -> Logits:
    """Logits `[N, C]` of an ONNX file, by default one example at a time and unpadded, as a device would see them.

    One at a time matters: a dynamically quantized graph shares one activation scale among all rows of a batch.
    A graph with fixed shapes gets its own batch and length: examples are padded to it, and repeated to fill a batch.
    """
    session = open_session(file, threads=threads)
    fixed = _fixed(session)
    batch_size = fixed[0] or batch_size
    rows = []
    for indices in _in_order(encoded, batch_size):
        rows.append(session.run(None, own_feeds(session, encoded, indices))[0][: len(indices)])
    return np.concatenate(rows)


def open_session(model: Any, *, threads: int = 0, optimize: bool = True) -> Any:
    """A session on this machine's CPU of a file or ModelProto; 0 threads leaves their number to ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def own_feeds(session: Any, encoded: Encoded, indices: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """Examples as a session takes them: of its own batch (the rows repeated) and length where those are fixed.

    One example alone is unpadded where the length is free.
    """
    names = {value.name for value in session.get_inputs()}
    batch, length = _fixed(session)
    whole = np.resize(indices, batch) if batch else indices
    own = int(encoded.lengths[indices].max()) if len(whole) == 1 else None
    made = encoded.collate(whole, length or own)
    return {name: value.numpy() for name, value in made.items() if name in names}


def _fixed(session: Any) -> tuple[int | None, int | None]:
    """The batch and the sequence length of a session's inputs, None where they are free or there is no sequence."""
    sizes = [size if isinstance(size, int) else None for size in session.get_inputs()[0].shape]
    return sizes[0], sizes[1] if len(sizes) == 2 else None


def torch_logits(model: Any, encoded: Encoded, *, batch_size: int = 32) -> Logits:
    """Logits `[N, C]` of a torch model in `eval()` mode, in float32."""
    import torch

    model.eval()
    rows: list[Logits] = [np.zeros(0, np.float32)] * len(encoded)
    with torch.no_grad():
        for indices in _by_length(encoded, batch_size):
            batch = {name: value for name, value in encoded.collate(indices).items() if name != "labels"}
            for index, row in zip(indices, model(**batch).logits.float().numpy(), strict=True):
                rows[index] = row
    return np.stack(rows)


def compare(reference: Logits, other: Logits) -> Parity:
    """Compare logits `[N, C]` of the same examples."""
    same = reference.argmax(axis=-1) == other.argmax(axis=-1)
    return Parity(float(np.abs(reference - other).max()), float(same.mean()), len(reference))


def require_parity(
    reference: Logits, other: Logits, precision: str, what: str, explain: Callable[[], str] | None = None
) -> Parity:
    """Compare and refuse a graph that does not say what the torch model says.

    Args:
        reference: logits `[N, C]` of the torch model or of the float graph.
        other: those of `what` on the same examples.
        precision: a key of `AGREEMENT`.
        what: the graph, for the message.
        explain: called on failure; what it returns is added to the message, see `edgekd.export.blame.explain`.

    Raises:
        StageError: non-finite logits, a float graph beyond `TOLERANCE`, or too few equal predictions.
    """
    try:
        return _require(reference, other, precision, what)
    except StageError as error:
        if explain is None:
            raise
        try:
            reason = explain()
        except Exception as trouble:  # noqa: BLE001 - the failure itself is what counts
            reason = f"the layer could not be found ({trouble})"
        raise StageError(f"{error}; {reason}") from None


def _require(reference: Logits, other: Logits, precision: str, what: str) -> Parity:
    if not np.isfinite(other).all():
        raise StageError(f"{what} gives logits that are not finite")
    parity = compare(reference, other)
    spread = max(float(reference.max() - reference.min()), 1.0)
    if precision == "fp32" and parity.max_abs > TOLERANCE * spread:
        raise StageError(
            f"{what} differs from the torch model by {parity.max_abs:.2e} on {parity.n} examples "
            f"(tolerance {TOLERANCE * spread:.2e})"
        )
    if parity.agreement < AGREEMENT[precision]:
        raise StageError(
            f"{what} agrees with the torch model on only {parity.agreement:.1%} of {parity.n} examples "
            f"(at least {AGREEMENT[precision]:.1%} are needed)"
        )
    return parity


def _in_order(encoded: Encoded, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    everything = np.arange(len(encoded), dtype=np.int64)
    for start in range(0, len(everything), batch_size):
        yield everything[start : start + batch_size]


def _by_length(encoded: Encoded, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    order = np.argsort(encoded.lengths, kind="stable").astype(np.int64)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
