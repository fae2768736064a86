"""Does the profiler add to what it measures: its median against that of a tight loop over `session.run`.

    python bench/profile_overhead.py [--rounds 20] [--cpu 1] [--model FILE.onnx …] [--out FILE.json]

The loop is what onnxruntime_perf_test does: load, warm up for a second, then time one `session.run` after another,
with the same inputs, threads and CPU, in a process of its own. Loop and profiler take turns; who begins changes from
round to round; each round gives one ratio of medians. The interval is a bootstrap over rounds. On a machine that others
use too the ratio of one round is noisy and the median over rounds is what counts; the ratio of the 10th percentiles is
given beside it, because they feel the other users less, and so is the ratio of the lowest medians of all rounds.

Models: a small perceptron made here, a BERT-like encoder (2 layers of width 128) exported from transformers with random
weights, SqueezeNet from the test data of the onnx package (Apache-2.0), and those given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import host
from edgekd.latency.artifact import Artifact
from edgekd.latency.bench import Settings
from edgekd.latency.workload import Fed, Workload
from edgekd.target import load_target

SECONDS = 1.0
LOOP = """
import json, os, sys, time
import numpy as np, onnxruntime
path, feeds, cpu, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
if cpu >= 0:
    os.sched_setaffinity(0, [cpu])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
inputs = dict(np.load(feeds))
def loop(seconds):
    run, clock, taken = session.run, time.perf_counter_ns, []
    end = clock() + seconds * 1e9
    while clock() < end:
        began = clock()
        run(None, inputs)
        taken.append(clock() - began)
    return taken
loop(1.0)
taken = loop(seconds)
p10, p50 = np.quantile(taken, (0.1, 0.5)) / 1e6
print(json.dumps({"p10_ms": p10, "p50_ms": p50, "n": len(taken)}))
"""


def perceptron(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, sizes = np.random.default_rng(0), (64, 256, 256, 10)
    nodes, weights = [], []
    for layer, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, (inner, outer)).astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"x{layer + 1}"]))
    value = helper.make_tensor_value_info
    ends = [value("x0", TensorProto.FLOAT, ["batch", 64])], [value("x3", TensorProto.FLOAT, ["batch", 10])]
    graph = helper.make_graph(nodes, "perceptron", *ends, weights)
    path = folder / "perceptron.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def encoder(folder: Path) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
                        vocab_size=2000, attn_implementation="eager")  # fmt: skip
    path = folder / "encoder.onnx"
    ids = torch.ones(1, 64, dtype=torch.long)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in names}
    torch.onnx.export(BertModel(config, add_pooling_layer=False).eval(), (ids, ids), str(path), input_names=names,
                      dynamic_axes=axes, opset_version=17, dynamo=False)  # fmt: skip
    return path


def squeezenet(folder: Path) -> Path:
    import onnx

    return Path(onnx.__file__).parent / "backend/test/data/light/light_squeezenet.onnx"


def loop(fed: Fed, cpu: int) -> dict[str, Any]:
    command = [sys.executable, "-c", LOOP, str(fed.subject.path), str(fed.subject.feeds), str(cpu), str(SECONDS)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def profiler(workload: Workload, fed: Fed, seed: int) -> dict[str, Any]:
    settings = Settings(blocks=round(SECONDS * 1000 / 20), warmup_seconds=1.0, max_seconds=60.0, seed=seed)
    (samples,) = workload.measure([fed], settings)
    p10, p50 = (float(value) for value in np.quantile(samples.ms, (0.1, 0.5)))
    return {"p10_ms": p10, "p50_ms": p50, "n": len(samples.ms), "preemptions": samples.preemptions}


def interval(ratios: np.ndarray) -> list[float]:
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    return [round(float(end), 5) for end in np.quantile(medians, (0.025, 0.975))]


def quietest(taken: list[dict[str, Any]], who: str) -> float:
    """The lowest median of all rounds: the round that others disturbed least."""
    return min(each[who]["p50_ms"] for each in taken)


def compare(path: Path, name: str, workload: Workload, cpu: int, rounds: int) -> dict[str, Any]:
    fed, taken = workload.feed("model", Artifact(path)), []
    for number in range(rounds):
        steps = {"loop": lambda: loop(fed, cpu), "profiler": lambda number=number: profiler(workload, fed, number)}
        order = list(steps) if number % 2 else list(steps)[::-1]
        taken.append({key: steps[key]() for key in order})
    ratios, quick = (
        np.array([each["profiler"][key] / each["loop"][key] for each in taken]) for key in ("p50_ms", "p10_ms")
    )
    row = {
        "model": name,
        "bytes": path.stat().st_size,
        "loop_p50_ms": round(float(np.median([each["loop"]["p50_ms"] for each in taken])), 6),
        "profiler_p50_ms": round(float(np.median([each["profiler"]["p50_ms"] for each in taken])), 6),
        "ratio": round(float(np.median(ratios)), 5),
        "ratio_ci95": interval(ratios),
        "p10_ratio": round(float(np.median(quick)), 5),
        "p10_ratio_ci95": interval(quick),
        "quietest_ratio": round(quietest(taken, "profiler") / quietest(taken, "loop"), 5),
        "ratio_of_rounds": [round(float(ratio), 5) for ratio in sorted(ratios)],
        "rounds": taken,
    }
    shown = " ".join("{:.4f} ({:.4f}–{:.4f})".format(row[key], *row[f"{key}_ci95"]) for key in ("ratio", "p10_ratio"))
    print(
        f"{name:20} loop {row['loop_p50_ms']:8.4f} ms  profiler {row['profiler_p50_ms']:8.4f} ms  {shown}", flush=True
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu", type=int, default=max(host.logical_cpus()))
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("bench/results/profile_overhead.json"))
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {make.__name__: make(folder) for make in (perceptron, encoder, squeezenet)}
        models |= {path.name: path for path in arguments.model}
        workload = Workload(target=load_target("local"), folder=folder, threads=1, cpus=(arguments.cpu,))
        rows = []
        for title, path in models.items():
            rows.append(compare(path, title, workload, arguments.cpu, arguments.rounds))
            save(arguments, rows, load)


def save(arguments: argparse.Namespace, rows: list[dict[str, Any]], load: tuple[float, ...]) -> None:
    machine = {"cpu": host.cpu_name(), "cores": host.usable_cores(), "load_before": load, "load_after": os.getloadavg()}
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "numpy", "onnx", "transformers")}
    result = {"machine": machine, "versions": versions, "cpu": arguments.cpu, "threads": 1, "models": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
