"""The model card of a bundle, `README.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.report.gains import HEADINGS, gains

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
        f"library_name: {_kind(artifact).lower()}",
        "tags: [edgekd, onnx, distillation]",
        "---",
        "",
        "# Compressed model",
        "",
        f"Made by edgekd {manifest['edgekd']}: {artifact['shape']}, {_form(artifact)}.",
        "",
        "| | teacher (fp32 ONNX) | this model |",
        "|---|---|---|",
        *_quality_rows(manifest),
        *_latency_rows(manifest["latency"]),
        "",
        *[
            f"Verdict on `{each['target']}`: **{each['status']}** ({_cell(each['reason'])})."
            for each in manifest["verdict"]
        ],
        "",
        *_how_known(manifest),
        *_stages(manifest),
        "## Run it",
        "",
        *_usage(manifest),
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
    rows.append(f"| {_kind(artifact)} file | {reference} | {artifact['size_bytes'] / 1e6:.2f} MB |")
    if "sparsity" in artifact:
        zeros = artifact["sparsity"]["zeros"] / artifact["sparsity"]["of"]
        rows.append(f"| zeros in the matrices of its layers ({artifact['sparsity']['pattern']}) | | {zeros:.1%} |")
        rows.append(f"| the file after deflate | | {artifact['compressed_bytes'] / 1e6:.2f} MB |")
    if "flash_bytes" in artifact:
        rows.append(f"| compiled for the device | | {artifact['flash_bytes'] / 1e6:.2f} MB |")
    return rows


def _latency_rows(latency: list[Mapping[str, Any]]) -> list[str]:
    rows = []
    for entry in latency:
        where = f"batch {entry['batch']}" + (f", {entry['sequence']} tokens" if entry.get("sequence") else "")
        where += f", {entry['threads']} thread(s)" if entry.get("threads") else ""
        if entry.get("p50_ms") is None:
            rows.append(f"| {entry['target']}: latency ({where}) | | unavailable: {_cell(entry.get('reason') or '')} |")
            continue
        kind = entry["kind"].replace("_", " ")
        speedup = f" ({entry['speedup']:.2f}×)" if entry.get("speedup") else ""
        teacher = f"{entry['teacher_p50_ms']:.3f} ms" if entry.get("teacher_p50_ms") else ""
        if entry.get("p95_ms") is None:
            where += ", teacher in the same form" if teacher else ""
            rows.append(f"| {entry['target']}: {kind} ({where}) | {teacher} | {entry['p50_ms']:.3f} ms{speedup} |")
            continue
        figures = f"{entry['p50_ms']:.3f} / {entry['p95_ms']:.3f} / {entry['p99_ms']:.3f} ms{speedup}"
        rows.append(f"| {entry['target']}: {kind} p50 / p95 / p99 ({where}) | {teacher} | {figures} |")
    return rows


def _kind(artifact: Mapping[str, Any]) -> str:
    return "TFLite" if str(artifact["file"]).endswith(".tflite") else "ONNX"


def _form(artifact: Mapping[str, Any]) -> str:
    """`int8 ONNX (int8_qdq, opset 21, fixed to batch 1, 64 tokens)`."""
    parts = [str(artifact["lowering"])]
    parts += [f"opset {artifact['opset']}"] if artifact.get("opset") else []
    if fixed := artifact.get("fixed"):
        parts.append(
            f"fixed to batch {fixed['batch']}" + (f", {fixed['sequence']} tokens" if "sequence" in fixed else "")
        )
    return f"{artifact['precision']} {_kind(artifact)} ({', '.join(parts)})"


def _how_known(manifest: Mapping[str, Any]) -> list[str]:
    """Where the latency comes from, for anything but a measurement."""
    lines = []
    for entry in manifest["latency"]:
        if entry["kind"] == "vendor_estimate":
            lines += [f"The latency on `{entry['target']}` was not measured: it is what the vendor's compiler states."]
            lines += [f"- {_cell(note)}" for note in entry.get("notes", ())]
        elif entry["kind"] == "unavailable":
            lines += [f"The latency on `{entry['target']}` is not known: {_cell(entry.get('reason') or '')}."]
    return ["## How the latency is known", "", *lines, ""] if lines else []


def _stages(manifest: Mapping[str, Any]) -> list[str]:
    """What each stage bought, and which were rolled back."""
    found = gains(manifest)
    if not found:
        return []
    table = [f"| {' | '.join(_cell(cell) for cell in row['cells'])} |" for row in found]
    remarks = [f"- {row['stage']}: {_cell(row['why'])}" for row in found if row["remark"]]
    return [
        "## What each stage bought",
        "",
        "Before → after, both in the form that would ship then; metrics on validation.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *table,
        "",
        *remarks,
        *([""] if remarks else []),
    ]


def _cell(text: str) -> str:
    """A text that stays in its cell of a table, whatever a compiler put into it."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _usage(manifest: Mapping[str, Any]) -> list[str]:
    artifact, task = manifest["artifact"], str(manifest["task"])
    device = [f"`{name}` was made by the vendor's compiler for the device." for name in artifact.get("device", ())]
    if _kind(artifact) == "TFLite":
        return [
            f"`{artifact['file']}` runs in TFLite's interpreter; its inputs are named like those of the model.",
            *device,
        ]
    processor, argument = PROCESSORS[task]
    model = PIPELINES[task]
    length = artifact.get("fixed", {}).get("sequence")
    padded = f', padding="max_length", truncation=True, max_length={length}' if length else ""
    if needs := artifact.get("needs"):
        device.append(f"The file needs ONNX Runtime {needs['onnxruntime']}, in transformers.js too.")
    if "compressed" in artifact:
        device.append(f"`{artifact['compressed']}` is the same file after gzip: unpack it to load it.")
    lines = [
        "```python",
        f"from optimum.onnxruntime import {model}",
        f"from transformers import {processor}, pipeline",
        "",
        'folder = "."  # this folder',
        f"model = {model}.from_pretrained(folder)",
        f"{argument} = {processor}.from_pretrained(folder)",
        f'classify = pipeline("{task}", model=model, {argument}={argument})',
        f"print(classify({EXAMPLES[task]}{padded}))",
        "```",
        "",
    ]
    if artifact.get("fixed") or manifest["latency"][0]["kind"] != "measured":
        return [*lines, "This runs it on a CPU, for its answers and not for its speed.", *device]
    return [
        *lines,
        "It runs at the stated speed in a plain `onnxruntime.InferenceSession` with default options on the target's",
        "execution provider, and loads in transformers.js from the same folder.",
        *device,
    ]
