"""How far an artifact is from what this machine's matrix products allow.

    taskset -c 1 python bench/roofline.py FLOAT.onnx [LOWERED.onnx …] [--batch 1] [--sequence 64] [--cpu 1]

The peak is the fastest product that ONNX Runtime computes here on one thread, in float32 and in 8 bits, among a few
large shapes, taken again between the measurements of the artifacts. The floor of an artifact is the time in which that
peak does the multiplications of the float graph, all of them in one precision; what a lowering leaves out because
nobody reads it is counted too in `floor_ms`, and not in `floor_needed_ms`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgekd import host
from edgekd.export.lean import lean
from edgekd.export.static import fix_shapes, infer_shapes
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.target import load_target

SHAPES = ((64, 1024, 1024), (128, 768, 3072), (256, 1024, 1024), (64, 384, 1536))
"""Rows, inputs and outputs of the products that the peak is looked for among."""
SECONDS = 1.5


def multiplications(graph: Any, *, batch: int, sequence: int) -> int:
    """Multiply-accumulates of a float graph for one input of this shape: products, convolutions and attention."""
    fixed = infer_shapes(fix_shapes(graph, batch=batch, sequence=sequence)).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*fixed.value_info, *fixed.input, *fixed.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in fixed.initializer}
    return sum(_of_node(node, shapes) for node in fixed.node)


def _of_node(node: Any, shapes: Mapping[str, list[int]]) -> int:
    if node.op_type in ("MatMul", "Gemm"):
        turned = any(item.name == "transA" and item.i for item in node.attribute)
        inner = shapes[node.input[0]][0 if turned else -1]
        return int(np.prod(shapes[node.output[0]])) * inner
    if node.op_type == "Conv":
        return int(np.prod(shapes[node.output[0]])) * int(np.prod(shapes[node.input[1]][1:]))
    if node.op_type == "Attention":
        (rows, queries, width), keys = shapes[node.input[0]], shapes[node.input[1]][1]
        return rows * queries * keys * (width + shapes[node.input[2]][2])
    return 0


def product(rows: int, inputs: int, outputs: int, *, integer: bool) -> tuple[Any, dict[str, Any]]:
    """A session of one product on one thread, and what it is fed."""
    rng = np.random.default_rng(0)
    if integer:
        weight: Any = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
        given: Any = rng.integers(0, 256, (rows, inputs)).astype(np.uint8)
        kinds, node = (TensorProto.UINT8, TensorProto.INT32), helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    else:
        weight = rng.normal(size=(inputs, outputs)).astype(np.float32)
        given = rng.normal(size=(rows, inputs)).astype(np.float32)
        kinds, node = (TensorProto.FLOAT, TensorProto.FLOAT), helper.make_node("MatMul", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", kinds[0], [rows, inputs])
    y = helper.make_tensor_value_info("y", kinds[1], [rows, outputs])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), {"x": given}


def peaks(seconds: float = SECONDS) -> dict[str, dict[str, float]]:
    """Multiply-accumulates per second in 10^9 by precision and shape: the lower quartile of the times of runs."""
    found: dict[str, dict[str, float]] = {"fp32": {}, "int8": {}}
    for precision, rates in found.items():
        for shape in SHAPES:
            session, feeds = product(*shape, integer=precision == "int8")
            taken: list[float] = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                session.run(None, feeds)
                taken.append(time.perf_counter() - start)
            rates["x".join(map(str, shape))] = float(np.prod(shape)) / float(np.quantile(taken, 0.25)) / 1e9
    return found


def best(rates: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The highest rate of each precision."""
    return {precision: max(by_shape.values()) for precision, by_shape in rates.items()}


def floors(source: Path, peak: Mapping[str, float], *, batch: int, sequence: int) -> dict[str, float]:
    """Multiplications of a float graph, whole and without rows nobody reads, and the milliseconds they take at best."""
    graph = onnx.load(source)
    whole = multiplications(graph, batch=batch, sequence=sequence)
    needed = multiplications(lean(graph), batch=batch, sequence=sequence)
    told: dict[str, float] = {"multiplications": whole, "needed": needed}
    for precision, rate in peak.items():
        told[f"{precision}_floor_ms"] = whole / rate / 1e6
        told[f"{precision}_floor_needed_ms"] = needed / rate / 1e6
    return told


def main() -> None:
    """Measure, print and, if asked, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="float graph, as edgekd exports it")
    parser.add_argument("lowered", type=Path, nargs="*")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--cpu", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = peaks()
    files = [options.source, *options.lowered]
    taken = measure(
        [Subject(name=str(file), path=file) for file in files],
        target=load_target("local"),
        batch=options.batch,
        sequence=options.sequence,
        threads=1,
        cpus=[options.cpu],
        settings=Settings(max_seconds=120.0),
    )
    rates = {p: {s: max(r, again[s]) for s, r in before[p].items()} for p, again in peaks().items()}
    told = floors(options.source, best(rates), batch=options.batch, sequence=options.sequence)
    result: dict[str, Any] = {"cpu": host.cpu_name(), "peaks_gmacs": rates, **told, "files": {}}
    print(f"peak: {', '.join(f'{p} {r:.0f} GMAC/s' for p, r in best(rates).items())}")
    print(f"floor: fp32 {told['fp32_floor_ms']:.2f} ms, int8 {told['int8_floor_ms']:.2f} ms "
          f"({told['int8_floor_needed_ms']:.2f} ms without unread rows)")  # fmt: skip
    for side in taken:
        p50, p10 = float(np.median(side.ms)), float(np.quantile(side.ms, 0.1))
        over = p50 / told["int8_floor_ms"]
        result["files"][side.name] = {"p50_ms": p50, "p10_ms": p10, "over_int8_floor": over}
        print(f"{side.name}: p50 {p50:.3f} ms, p10 {p10:.3f} ms, {over:.2f} times the int8 floor")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
