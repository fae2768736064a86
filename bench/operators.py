"""What each operator saves on this machine: a small BERT with and without it, in ONNX Runtime on one thread.

    taskset -c 1 python bench/operators.py [--cpu 1] [--blocks 150] [--out bench/results/operators.json]

The model is a random BertConfig of width 384 cut to 6 heads of 32 and 512 neurons in each of 4 (or 2) layers, about
what a compressed MiniLM looks like; batch 1, 64 tokens. All variants take turns within one run, in a session with
default options. A ratio is the median of the plain model in the same form over the variant's (above 1: the variant is
faster), with a 95 % interval from a bootstrap over blocks. `quiet_ms` and `quiet_ratio` are the same of the lower
quartile of the blocks' fastest runs, which other users of the machine disturb less. A form that
ends on `packed` writes query, key and value as one product (`edgekd.export.packed`), in `fused_packed` where the usual
fusions leave attention as it is; it is compared with the same variant in the fused form.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import host
from edgekd.latency.bench import Settings, Subject, measure
from edgekd.latency.stats import Samples, ratio_interval
from edgekd.target import load_target

FORMS = ("fp32_fused", "int8_dynamic_fused")
PACKED = ("plain", "first_token", "tokens_32_first")
PLAIN = ("fp32", "fp32_fused", "int8_dynamic", "int8_dynamic_fused")


def changes(depth: int) -> dict[str, list[dict[str, Any]]]:
    """Variants by name: what changes in each layer."""
    none: list[dict[str, Any]] = [{} for _ in range(depth)]
    first = [*none[:-1], {"tokens": 1}]
    if depth < 4:
        return {"plain": none, "first_token": first}
    return {
        "plain": none,
        "first_token": first,
        "tokens_32": [{"tokens": 32}, *none[1:]],
        "tokens_32_first": [{"tokens": 32}, *first[1:]],
        "share_1": [{}, {}, {"shares": True}, {}],
        **{name: [{"activation": name}] * depth for name in ("relu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu")},
        "affine": [{"norm": "affine"}] * depth,
        "rank_2x": [{"rank": 82}] * depth,
    }


def student(depth: int) -> Any:
    """The plain model."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from edgekd.families import arch_of, family_of
    from edgekd.student import Student

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1024, hidden_size=384, num_hidden_layers=depth, num_attention_heads=12, intermediate_size=512
    )
    model = BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    family = family_of("bert")
    for layer in family.layers(model):
        family.slice_heads(layer, torch.arange(6), 32)
    return Student(model=model, arch=arch_of(model))


def image_student() -> Any:
    """A ViT of 4 layers of width 192 with 3 heads for 96 x 96 pixels: 37 tokens, and attention that is never fused."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from edgekd.families import arch_of
    from edgekd.student import Student

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384, image_size=96
    )
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    return Student(model=model, arch=arch_of(model))


def build(folder: Path) -> dict[str, Path]:
    """All files by `DEPTH layers, VARIANT, FORM`."""
    from edgekd.calibrate.graphs import fix_image
    from edgekd.export.lower import lower
    from edgekd.export.onnx import export_float
    from edgekd.families.compact import install

    files = {}
    for depth in (4, 2):
        own = student(depth)
        for name, new in changes(depth).items():
            model = copy.deepcopy(own.model)
            layers = [replace(layer, **change) for layer, change in zip(own.arch.layers, new, strict=True)]
            install(model, own.family, layers)
            graph = export_float(own.with_model(model), "text-classification", folder / f"{depth}-{name}.onnx")
            for form in PLAIN if name == "plain" and depth == 4 else FORMS:
                file = folder / f"{depth}-{name}-{form}.onnx"
                files[f"{depth} layers, {name}, {form}"] = lower(graph, file, form, model_type="bert")
            if depth == 4 and name in PACKED:
                fused = name != "plain"
                for form, file in pack(graph, folder / f"{name}-packed", "bert", fused=fused).items():
                    files[f"{depth} layers, {name}, {form}"] = file
    own = image_student()
    graph = export_float(own, "image-classification", folder / "vit.onnx")
    fix_image(graph, 3, 96)
    for form in FORMS:
        files[f"ViT, plain, {form}"] = lower(graph, folder / f"vit-{form}.onnx", form, model_type="vit")
    for form, file in pack(graph, folder / "vit-packed", "vit", fused=True).items():
        files[f"ViT, plain, {form}"] = file
    return files


def pack(graph: Path, stem: Path, model_type: str, *, fused: bool) -> dict[str, Path]:
    """Both precisions with packed projections; `fused`: those alone that the usual fusions leave over."""
    import onnx

    from edgekd.export.lower import fuse, keep_residuals_apart, lower
    from edgekd.export.packed import pack_projections

    packed = fuse(onnx.load(graph), model_type) if fused else onnx.load(graph)
    pack_projections(packed)
    floats, ints = stem.with_suffix(".fp32.onnx"), stem.with_suffix(".int8.onnx")
    onnx.save(packed, floats)
    lower(floats, ints, "int8_dynamic")
    for file in (floats, ints):
        made = onnx.load(file)
        keep_residuals_apart(made)
        onnx.save(made, file)
    kind = "fused_packed" if fused else "packed"
    return {f"fp32_{kind}": floats, f"int8_dynamic_{kind}": ints}


def compare(samples: Mapping[str, Samples]) -> dict[str, dict[str, Any]]:
    """Medians, and ratios to the plain model (packed: the same variant) in the fused form of the precision."""
    found = {}
    for name, taken in samples.items():
        depth, variant, form = name.split(", ")
        usual = FORMS[0] if form.startswith("fp32") else FORMS[1]
        base = samples[f"{depth}, {variant if 'packed' in form else 'plain'}, {usual}"]
        low, high = ratio_interval(base, taken, level=0.95)
        quiet, quiet_interval = _quiet(base, taken)
        found[name] = {
            "p50_ms": round(float(np.median(taken.ms)), 4),
            "quiet_ms": round(quiet[1], 4),
            "ratio": round(float(np.median(base.ms) / np.median(taken.ms)), 4),
            "ratio_ci95": [round(low, 4), round(high, 4)],
            "quiet_ratio": round(quiet[0] / quiet[1], 4),
            "quiet_ratio_ci95": [round(end, 4) for end in quiet_interval],
            "n": len(taken.ms),
        }
    return found


def _quiet(base: Samples, taken: Samples) -> tuple[list[float], list[float]]:
    """Lower quartiles of the blocks' minima of both, and the 95 % interval of their ratio."""
    labels = np.intersect1d(base.block, taken.block)
    least = np.array([[side.ms[side.block == label].min() for label in labels] for side in (base, taken)])
    drawn = np.random.default_rng(0).integers(0, len(labels), (2000, len(labels)))
    quartiles = np.quantile(least[:, drawn], 0.25, axis=2)
    ends = np.quantile(quartiles[0] / quartiles[1], (0.025, 0.975))
    return [float(np.quantile(side, 0.25)) for side in least], [float(end) for end in ends]


def main() -> None:
    """Build, time, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "operators.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = build(Path(name))
        taken = measure(
            [Subject(name=key, path=path) for key, path in files.items()],
            target=load_target("local"),
            batch=1,
            sequence=64,
            threads=1,
            cpus=[options.cpu],
            settings=Settings(
                blocks=options.blocks, block_ms=12.0, min_runs=options.blocks, warmup_seconds=0.5, max_seconds=600.0
            ),
        )
        sizes = {key: path.stat().st_size for key, path in files.items()}
    found = compare({side.name: side for side in taken})
    for key, facts in found.items():
        facts["size_bytes"] = sizes[key]
        (low, high), (least, most) = facts["ratio_ci95"], facts["quiet_ratio_ci95"]
        print(
            f"{key:44s} {facts['p50_ms']:8.3f} ms  {facts['ratio']:6.3f} [{low:.3f}, {high:.3f}]"
            f"  quiet {facts['quiet_ms']:6.3f} ms {facts['quiet_ratio']:.3f} [{least:.3f}, {most:.3f}]"
        )
    result = {"cpu": host.cpu_name(), "batch": 1, "sequence": 64, "threads": 1, "host": taken[0].facts, "models": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
