"""Weights alone in 8 and 4 bits, against float and int8: accuracy, size, latency, and the proof of exactness.

    python bench/weight_only.py TEACHER --data DATA [--threads 1] [--neural-compressor]

Latencies come of one interleaved run; `ratio` is the float model's median over the form's. Exact: the integers and
scales that come out of the file, unpacked, are those that the quantizer chose. With --neural-compressor its own GPTQ
is run too, and its integers are packed in the same way. Writes bench/results/weight_only.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgekd.context import Silent
from edgekd.data import DataSpec
from edgekd.export.lower import lower
from edgekd.export.matmul_nbits import block_size, dequantized, stored
from edgekd.export.nbits import Grid, canonical, grid_of_module, nearest, read
from edgekd.export.onnx import export_float, quiet_export
from edgekd.export.parity import onnx_logits
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.pipeline.setup import prepare
from edgekd.quantize.linear import copied, linear_layers, observe_inputs
from edgekd.quantize.sensitivity import divergence
from edgekd.quantize.weight_only import quantize_weights
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target, probe

RESULTS = Path(__file__).parent / "results" / "weight_only.json"
RTN = tuple(Grid(bits=4, group=g, symmetric=s) for g in (32, 64, 128) for s in (False, True))
GPTQ = (Grid(bits=4, group=32, symmetric=False), Grid(bits=4, group=128, symmetric=False), Grid(bits=4, group=32))
NEURAL = Grid(bits=4, group=32, symmetric=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="score on every so-many-th validation example")
    parser.add_argument("--samples", type=int, default=128, help="training examples that GPTQ looks at")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--neural-compressor", action="store_true", help="its GPTQ too")
    parser.add_argument("--no-latency", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setup = prepare(options.teacher, DataSpec(path=str(options.data)), max_length=options.max_length, progress=Silent())
    validation = setup.validation.take(np.arange(0, len(setup.validation), options.every))
    with tempfile.TemporaryDirectory() as scratch:
        files = _files(setup, Path(scratch), options)
        reference = onnx_logits(files["fp32"][0], validation)
        ratios = {} if options.no_latency else _ratios({k: v[0] for k, v in files.items()}, options)
        rows = []
        for name, (file, exact) in files.items():
            logits = onnx_logits(file, validation)
            rows.append({
                "form": name, "accuracy": round(setup.task.score(logits, validation.labels), 4),
                "divergence": round(divergence(reference, logits), 5), "size_mb": round(file.stat().st_size / 1e6, 2),
                "times_fp32": ratios.get(name), "exact": exact,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    result = {"teacher": options.teacher.name, "examples": len(validation), "threads": options.threads, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _files(setup: Any, work: Path, options: Any) -> dict[str, tuple[Path, bool | None]]:
    """Every form's file, and whether what it holds is what was chosen."""
    teacher, kind = setup.teacher, setup.teacher.model.config.model_type
    graph = export_float(teacher, setup.task.name, work / "float.onnx")
    files: dict[str, tuple[Path, bool | None]] = {}
    for form, name in (("fp32", "fp32"), ("fp32_lean", "fp32 lean"), ("int8_dynamic_fused", "int8 dynamic fused"),
                       ("int8_dynamic_lean", "int8 dynamic lean")):  # fmt: skip
        files[name] = lower(graph, work / f"{form}.onnx", form, model_type=kind), None
    tables = lower(graph, work / "int8.onnx", "int8_weights")
    files["int8 weights, RTN per row"] = tables, _holds(tables, teacher, Grid(bits=8, group=0), rounded=True)
    level = {"accuracy_level": 1}
    files["int8 weights, RTN per row, float products"] = (
        lower(graph, work / "int8_float.onnx", "int8_weights", weights=level), None
    )  # fmt: skip
    for grid in RTN:
        made = lower(graph, work / f"rtn{grid.group}{grid.symmetric}.onnx", "int4_weights", weights=grid.to_dict())
        files[f"int4 weights, RTN {_words(grid)}"] = made, _holds(made, teacher, grid, rounded=True)
    inputs = observe_inputs(teacher.model, sample_batches(setup.train, options.samples, seed=2))
    chosen = [("GPTQ", grid, *quantize_weights(teacher, grid, inputs)) for grid in GPTQ]
    if options.neural_compressor:
        chosen.append(("neural-compressor's GPTQ", NEURAL, *_neural(setup, work, options)))
    for index, (method, grid, student, weights) in enumerate(chosen):
        source = export_float(student, setup.task.name, work / f"chosen{index}.float")
        made = lower(source, work / f"chosen{index}.onnx", "int4_weights", weights=weights)
        files[f"int4 weights, {method} {_words(grid)}"] = made, _holds(made, student, grid, rounded=False)
    return files


def _words(grid: Grid) -> str:
    return f"{grid.group} {'symmetric' if grid.symmetric else 'zero points'}"


def _holds(file: Path, student: Any, grid: Grid, *, rounded: bool) -> bool:
    """Whether the unpacked file has the integers, zero points and scales that were chosen, all of them equal."""
    model = onnx.load(file)
    integers, values = stored(model), dequantized(model)
    for name, layer in linear_layers(student.model).items():
        weight, own = layer.weight.detach().numpy(), grid_of_module(grid, name)
        blocks = nearest(weight, own) if rounded else read(weight, own)
        owner = np.arange(weight.shape[1]) // block_size(own, weight.shape[1])
        numbers, _, points = integers[name]
        if not np.array_equal(values[name], blocks.values()) or (
            not rounded and not np.array_equal(values[name], weight)
        ):
            return False
        if not np.array_equal(numbers.astype(int) - points.astype(int)[:, owner], blocks.steps):
            return False
    return True


def _neural(setup: Any, work: Path, options: Any) -> tuple[Any, dict[str, Any]]:
    """neural-compressor's GPTQ, which looks at the layers one after the other and wants the model as a folder."""
    folder = work / "saved"
    replace(setup.teacher, quantization=None).save(folder)
    with quiet_export():
        from neural_compressor.torch.quantization import GPTQConfig, convert
        from neural_compressor.torch.quantization import prepare as prepare_model

        model = copied(setup.teacher).model
        model.path = str(folder)
        settings = {"use_sym": NEURAL.symmetric, "model_path": str(folder)}
        model = prepare_model(model, GPTQConfig(bits=4, group_size=NEURAL.group, **settings))
        sampled = setup.train.take(np.random.default_rng(2).permutation(len(setup.train))[: options.samples])
        with torch.no_grad():
            for index in range(len(sampled)):
                batch = sampled.collate(np.array([index]), int(sampled.lengths[index]))
                model(**{key: value for key, value in batch.items() if key != "labels"})
        model = convert(model)
    changed = copied(setup.teacher)
    for name, layer in linear_layers(changed.model).items():
        packed, own = model.get_submodule(name), grid_of_module(NEURAL, name)
        if not hasattr(packed, "unpack"):  # it quantizes the repeated layers only
            layer.weight.data.copy_(torch.from_numpy(nearest(layer.weight.detach().numpy(), own).values()))
            continue
        told = packed.unpack()
        points = torch.repeat_interleave(told.get("zp").int(), packed.group_size, dim=1)[:, : packed.in_features]
        steps = (told.get("int_weight").int() - points).numpy()
        blocks = canonical(steps, told.get("scales").float().numpy(), own)
        layer.weight.data.copy_(torch.from_numpy(blocks.values()))
    return changed, {**NEURAL.to_dict(), "method": "neural-compressor"}


def _ratios(files: dict[str, Path], options: Any) -> dict[str, float]:
    samples = measure(
        [Subject(name=name, path=file) for name, file in files.items()],
        target=probe(load_target("local")), batch=1, sequence=options.max_length, threads=options.threads,
        settings=Settings(blocks=40),
    )  # fmt: skip
    medians = {each.name: float(np.median(each.ms)) for each in samples}
    return {name: round(medians["fp32"] / ms, 3) for name, ms in medians.items()}


if __name__ == "__main__":
    main()
