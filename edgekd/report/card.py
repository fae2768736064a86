"""The model card of a bundle, `README.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PIPELINES = {
    "text-classification": "ORTModelForSequenceClassification",
    "image-classification": "ORTModelForImageClassification",
}
PROCESSORS = {
    "text-classification": ("AutoTokenizer", "tokenizer"),
    "image-classification": ("AutoImageProcessor", "image_processor"),
}
EXAMPLES = {"text-classification": '"some text"', "image-classification": '"picture.png"'}


def model_card(manifest: Mapping[str, Any]) -> str:
    """Markdown with metrics, latency and how to run; `manifest` is that of `edgekd.json`."""
    artifact, task = manifest["artifact"], str(manifest["task"])
    lines = [
        "---",
        f"pipeline_tag: {task}",
        "library_name: onnx",
        "tags: [edgekd, onnx, distillation]",
        "---",
        "",
        "# Compressed model",
        "",
        f"Made by edgekd {manifest['edgekd']}: {artifact['shape']}, "
        f"{artifact['precision']} ONNX ({artifact['lowering']}, opset {artifact['opset']}).",
        "",
        "| | teacher (fp32 ONNX) | this model |",
        "|---|---|---|",
        *_quality_rows(manifest),
        *_latency_rows(manifest["latency"]),
        "",
        *[f"Verdict on `{each['target']}`: **{each['status']}** ({each['reason']})." for each in manifest["verdict"]],
        "",
        "## Run it",
        "",
        *_usage(task),
        "",
        "`edgekd.json` beside this file has every figure, the versions, and the SHA-256 of each file.",
        "",
    ]
    return "\n".join(lines)


def _quality_rows(manifest: Mapping[str, Any]) -> list[str]:
    quality, teacher, artifact = manifest["quality"], manifest["teacher"], manifest["artifact"]
    rows = []
    if quality is not None:
        low, high = quality["ci95"]
        own = f"{quality['value']:.4f} (95 % interval {low:.4f}–{high:.4f})"
        reference = f"{teacher['value']:.4f}" if teacher else ""
        rows.append(f"| {quality['metric']} on {quality['split']} (n={quality['n']}) | {reference} | {own} |")
    reference = f"{teacher['size_bytes'] / 1e6:.2f} MB" if teacher else ""
    return [*rows, f"| ONNX file | {reference} | {artifact['size_bytes'] / 1e6:.2f} MB |"]


def _latency_rows(latency: list[Mapping[str, Any]]) -> list[str]:
    rows = []
    for entry in latency:
        where = f"batch {entry['batch']}" + (f", {entry['sequence']} tokens" if entry.get("sequence") else "")
        where += f", {entry['threads']} thread(s)" if entry.get("threads") else ""
        label = f"| {entry['target']}: {entry['kind'].replace('_', ' ')} p50 / p95 / p99 ({where})"
        if entry.get("p50_ms") is None:
            rows.append(f"{label} | | unavailable: {entry.get('reason', '')} |")
            continue
        speedup = f" ({entry['speedup']:.2f}×)" if entry.get("speedup") else ""
        teacher = f"{entry['teacher_p50_ms']:.3f} ms" if entry.get("teacher_p50_ms") else ""
        rows.append(
            f"{label} | {teacher} | {entry['p50_ms']:.3f} / {entry['p95_ms']:.3f} / {entry['p99_ms']:.3f} ms{speedup} |"
        )
    return rows


def _usage(task: str) -> list[str]:
    processor, argument = PROCESSORS[task]
    model = PIPELINES[task]
    return [
        "```python",
        f"from optimum.onnxruntime import {model}",
        f"from transformers import {processor}, pipeline",
        "",
        'folder = "."  # this folder',
        f"model = {model}.from_pretrained(folder)",
        f"{argument} = {processor}.from_pretrained(folder)",
        f'classify = pipeline("{task}", model=model, {argument}={argument})',
        f"print(classify({EXAMPLES[task]}))",
        "```",
        "",
        "It runs at the stated speed in a plain `onnxruntime.InferenceSession` with default options, and loads in",
        "transformers.js from the same folder.",
    ]
