"""Which layer of a lowered graph goes wrong: its tensors, one by one, beside those of the float graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd.export.masks import BARRED
from edgekd.export.names import module_of, module_of_name, multiplied
from edgekd.export.noise import Noise
from edgekd.export.parity import open_session, own_feeds

if TYPE_CHECKING:
    from edgekd.tasks import Encoded

Array = npt.NDArray[Any]

TOLERANCE_DB = {"fp32": 60.0, "fp16": 30.0, "bf16": 25.0, "int8": 10.0, "int4": 6.0}
"""Least signal-to-noise ratio of a tensor by precision. Sound int8 graphs stay at 15 to 40 dB, float ones over 90."""
EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One tensor of the float graph and how the lowered graph's differs from it.

    `sqnr_db` is the ratio of signal to quantization noise in dB, of the whole tensor or of its median channel,
    whichever is lower: where a few channels are large, they alone make the first one look well. `max_abs` is the
    largest difference. `added` is the share of noise in the tensor that none of those it was computed from had.
    """

    tensor: str
    module: str
    operator: str
    sqnr_db: float
    max_abs: float
    added: float

    def describe(self) -> str:
        """`TENSOR, module MODULE (OPERATOR), SQNR 8.1 dB`."""
        owner = f"module {self.module}" if self.module else "of no module"
        return f"{self.tensor}, {owner} ({self.operator}), SQNR {self.sqnr_db:.1f} dB"


@dataclass(frozen=True, kw_only=True)
class Blame:
    """Tensors that both graphs have, in the order of the float graph.

    `absent` are modules of which nothing could be compared, because the lowered graph fused all their tensors away.
    `plain_db` is the SQNR of the output when the runtime may optimize the graph, as it does when nobody looks inside.
    """

    layers: tuple[Layer, ...]
    absent: tuple[str, ...]
    tolerance_db: float
    plain_db: float

    @property
    def first(self) -> Layer | None:
        """The first tensor that leaves tolerance, or None."""
        return next((layer for layer in self.layers if layer.sqnr_db < self.tolerance_db), None)

    @property
    def loudest(self) -> Layer | None:
        """The tensor to which most noise is added."""
        return max(self.layers, key=lambda layer: layer.added, default=None)

    @property
    def suspects(self) -> tuple[str, ...]:
        """Modules in the order of the noise that is added in them, the worst first: whom to give more bits."""
        ranked = sorted(self.layers, key=lambda layer: -layer.added)
        return tuple(dict.fromkeys(layer.module for layer in ranked if layer.module and layer.added > 0))

    def describe(self) -> str:
        """What to tell the user, in one line."""
        if not self.layers:
            return "the two graphs have no tensor in common, so no layer can be blamed"
        told = f"no tensor leaves tolerance ({self.tolerance_db:.0f} dB)"
        if self.first is not None:
            told = f"first tensor that leaves tolerance: {self.first.describe()} (at least {self.tolerance_db:.0f} dB)"
        elif self.plain_db < self.tolerance_db:
            told += (
                f", but the output has {self.plain_db:.1f} dB when ONNX Runtime optimizes the graph: "
                "one of its graph optimizers changes the values"
            )
        if self.loudest is not None and self.loudest != self.first:
            told += f"; most noise is added at {self.loudest.describe()}"
        if self.absent:
            shown = ", ".join(self.absent[:3]) + (", …" if len(self.absent) > 3 else "")
            told += f"; not compared, because the graph fused them away: {shown}"
        return told

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return {
            "tolerance_db": self.tolerance_db,
            "plain_db": self.plain_db,
            "first": vars(self.first) if self.first else None,
            "layers": [vars(layer) for layer in self.layers],
            "absent": list(self.absent),
        }


def blame(
    reference: Path, other: Path, examples: Encoded, *, precision: str = "int8", tolerance_db: float | None = None,
    count: int = EXAMPLES,
) -> Blame:  # fmt: skip
    """Run both graphs on some examples with all tensors as outputs and compare those with the same name.

    The float graph takes each example unpadded, where it can; a lowered graph with fixed shapes takes it padded, and of
    its tensors the part is compared that the other has too. Scores barred by a mask are left out. A tensor that is
    quantized is taken as its readers see it, rounded.

    Args:
        reference: the float graph that `other` was lowered from.
        other: any ONNX form of it.
        examples: what to run.
        precision: chooses the tolerance, see `TOLERANCE_DB`.
        tolerance_db: least SQNR of a tensor instead.
        count: how many examples, spread over all.
    """
    import onnx

    graphs = [onnx.load(str(file)) for file in (reference, other)]
    names = _shared(*graphs)
    sessions = [_watched(graphs[0], list(names)), _watched(graphs[1], list(names.values()))]
    plain = open_session(other)
    noises = {name: Noise() for name in names}
    result = Noise()
    left = bool(getattr(examples, "left", False))
    for index in np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(np.int64):
        said = [session.run(None, own_feeds(session, examples, np.array([index]))) for session in sessions]
        for name, signal, noisy in zip(names, *said, strict=True):
            _hear(noises[name], np.asarray(signal), np.asarray(noisy), left)
        final = plain.run(None, own_feeds(plain, examples, np.array([index])))[0]
        _hear(result, np.asarray(said[0][list(names).index(_output(graphs[0]))]), final, left)
    layers = _layers(graphs[0], noises)
    there = {layer.module for layer in layers}
    absent = [module for module in _modules(graphs[0]) if module not in there]
    limit = TOLERANCE_DB[precision] if tolerance_db is None else tolerance_db
    return Blame(layers=tuple(layers), absent=tuple(absent), tolerance_db=limit, plain_db=result.sqnr_db)


def explain(reference: Path, other: Path, examples: Encoded, precision: str) -> Callable[[], str]:
    """For `require_parity`: says whom to blame, and that only if it is asked."""
    return lambda: blame(reference, other, examples, precision=precision).describe()


def _shared(floats: Any, lowered: Any) -> dict[str, str]:
    """Tensors of the float graph and what readers of the same tensor see in the lowered one, in order."""
    made = {name for node in lowered.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in lowered.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in lowered.graph.output}
    found = {}
    for node in floats.graph.node:
        if node.op_type not in ("Constant", "Shape"):
            for name in node.output:
                if name in made:
                    found[name] = name if name in outputs else _rounded(name, readers)
    return found


def _rounded(name: str, readers: Mapping[str, Sequence[Any]]) -> str:
    """The output of the Q/DQ pair on a tensor, if there is one."""
    for quantize in readers.get(name, ()):
        if quantize.op_type == "QuantizeLinear":
            for back in readers.get(quantize.output[0], ()):
                if back.op_type == "DequantizeLinear":
                    return str(back.output[0])
    return name


def _watched(graph: Any, names: Sequence[str]) -> Any:
    """A session of the graph that gives these tensors, unoptimized: nothing is fused away or reordered."""
    import onnx

    opened = onnx.ModelProto()
    opened.CopyFrom(graph)
    del opened.graph.output[:]
    # Without a type: the runtime infers it.
    opened.graph.output.extend([onnx.ValueInfoProto(name=name) for name in names])
    return open_session(opened, optimize=False)


def _hear(noise: Noise, signal: Array, noisy: Array, left: bool) -> None:
    """Count in one example, the part of the tensor that both graphs have."""
    if signal.dtype.kind != "f" or noisy.dtype.kind != "f" or signal.ndim != noisy.ndim:
        return
    # Padding, copies that fill a batch, and rows that one of the graphs does without are not compared.
    sizes = [min(pair) for pair in zip(signal.shape, noisy.shape, strict=True)]
    signal, noisy = _part(signal, sizes, False), _part(noisy, sizes, left)
    noise.add(signal, noisy, open_=signal > BARRED)


def _part(values: Array, sizes: Sequence[int], left: bool) -> Array:
    whole = enumerate(zip(values.shape, sizes, strict=True))
    return values[tuple(slice(have - size, None) if left and axis else slice(size) for axis, (have, size) in whole)]


def _layers(graph: Any, noises: Mapping[str, Noise]) -> list[Layer]:
    maker = {name: node for node in graph.graph.node for name in node.output}
    heard = {name: noise for name, noise in noises.items() if noise.heard}
    before: dict[str, float] = {}
    found = []
    for node in graph.graph.node:
        # Noise of the nearest tensors before this one that were compared.
        inherited = max((before.get(name, 0.0) for name in node.input), default=0.0)
        for name in node.output:
            before[name] = inherited
            if name not in heard:
                continue
            noise = heard[name]
            before[name] = noise.ratio
            found.append(
                Layer(
                    tensor=name, module=module_of(maker[name]) or module_of_name(name), operator=node.op_type,
                    sqnr_db=noise.sqnr_db, max_abs=noise.max_abs, added=max(0.0, noise.ratio - inherited),
                )
            )  # fmt: skip
    return found


def _modules(graph: Any) -> list[str]:
    """Modules with weights: those with a MatMul, Gemm or Conv of a constant, in order."""
    return list(multiplied(graph))


def _output(graph: Any) -> str:
    return str(graph.graph.output[0].name)
