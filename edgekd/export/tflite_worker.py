"""The process that turns torch models into int8 TFLite files, one after the other.

A process of its own, because the converter brings JAX along, prints to both streams and changes global state of torch.
It reads one JSON request a line from its standard input and answers each with one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BARRED = 10.0
"""How far below the others an attention score is put to bar it: e^-10 is nothing to an 8-bit softmax, and the lowest
float, which transformers adds, would leave the scores themselves a single step of the 8 bits."""
WIDE = (r".*LayerNorm.*", r".*(Output_output|Linear_lin2|Linear_fc2).*")
"""Scopes that get activations of 16 bits where 8 are too few: layer norms, which square what they read, and the second
layer of feed-forward networks with the residual sum behind it, in which encoders have their outliers."""
ENOUGH_DB = 15.0
"""Signal to noise of the logits that 8 bits must reach to be kept."""
SCORED = 32


def convert(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do one request (see `edgekd.export.tflite`): `model`, `auto_class`, `feeds`, `batch`, `output`, `wide`.

    Returns:
        `seconds` of each step, the `inputs` of the file and whether it is `wide`.
    """
    import numpy as np
    import torch

    from edgekd.student import load_student

    clock = _Clock()
    student = load_student(request["model"], auto_class=request["auto_class"])
    with np.load(request["feeds"], allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    names = sorted(arrays)
    batch = int(request["batch"])
    example = {name: torch.from_numpy(arrays[name][:batch]) for name in names}
    clock.lap("load")
    floats = Path(request["output"]).with_suffix(".float")
    _to_float(traceable(student.model.eval()), example, floats)
    clock.lap("convert")
    rows = range(0, len(arrays[names[0]]) - batch + 1, batch)
    feeds = [{name: arrays[name][i : i + batch] for name in names} for i in rows]
    wide = request.get("wide", False)
    _quantize(floats, feeds, request["output"], wide=bool(wide))
    if wide is None:
        wide = _widened(floats, feeds, Path(request["output"]))
    floats.unlink()
    clock.lap("quantize")
    return {"seconds": clock.seconds, "inputs": names, "wide": wide}


def _widened(floats: Path, feeds: list[dict[str, Any]], output: Path) -> bool:
    """Put the file with wider activations in the place of one whose logits are too noisy, if it is the better one."""
    narrow = _noise(floats, output, feeds[:SCORED])
    if narrow >= ENOUGH_DB:
        return False
    other = output.with_suffix(".wide")
    _quantize(floats, feeds, str(other), wide=True)
    better = _noise(floats, other, feeds[:SCORED]) > narrow
    if better:
        other.replace(output)
    other.unlink(missing_ok=True)
    return better


def _noise(floats: Path, file: Path, feeds: list[dict[str, Any]]) -> float:
    """Signal to noise of a file's logits, in dB, the float file's being the signal."""
    import numpy as np

    from edgekd.export.noise import decibels
    from edgekd.export.tflite import tflite_logits

    signal, noisy = (tflite_logits(each, feeds).astype(np.float64) for each in (floats, file))
    # What all classes have in common decides nothing.
    signal, noisy = (values - values.mean(axis=1, keepdims=True) for values in (signal, noisy))
    return decibels(float(np.square(noisy - signal).sum() / max(np.square(signal).sum(), 1e-30)))


def _to_float(module: Any, example: Mapping[str, Any], output: Path) -> None:
    import litert_torch

    litert_torch.convert(module, sample_kwargs=dict(example)).export(str(output))


def _quantize(floats: Path, feeds: list[dict[str, Any]], output: str, *, wide: bool = False) -> None:
    """8-bit weights and activations, and 8-bit word tables, which stay on the CPU with float results.

    With `wide`, activations in the scopes of `WIDE` have 16 bits.
    """
    from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe_manager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    names = qtyping.TFLOperationName
    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(regex=".*", operation_name=names.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for scope in WIDE if wide else ():
        recipe.add_static_config(
            regex=scope, operation_name=names.ALL_SUPPORTED, activation_num_bits=16, weight_num_bits=8
        )
    recipe.add_dynamic_config(regex=".*", operation_name=names.EMBEDDING_LOOKUP, num_bits=8)
    work = quantizer.Quantizer(str(floats))
    work.load_quantization_recipe(recipe.get_quantization_recipe())
    # Quantizer.calibrate would take the range of the first example and move 5 % towards each of the others.
    seen = calibrator.Calibrator(str(floats), num_threads=1, qsv_update_func=min_max_update)
    seen.calibrate({"serving_default": feeds}, recipe)
    work.quantize(seen.get_model_qsvs()).export_model(output, overwrite=True)


def traceable(model: Any) -> Any:
    """The model with logits as its only output, written in operators that an 8-bit NPU computes well."""
    import torch

    class Traceable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **feeds: Any) -> Any:
            mask = feeds.pop("attention_mask", None)
            bias = None if mask is None else ((mask.float() - 1) * BARRED)[:, None, None, :]
            with _plain_operators(self.model, bias):
                return self.model(**feeds, **_positions(self.model, feeds)).logits

    return Traceable().eval()


def _positions(model: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Fixed positions for models that count tokens up to the padding: the same for text that is padded behind."""
    import torch

    if model.config.model_type not in ("roberta", "xlm-roberta"):
        return {}
    first = model.config.pad_token_id + 1
    return {"position_ids": torch.arange(first, first + feeds["input_ids"].shape[1])[None]}


@contextmanager
def _plain_operators(model: Any, bias: Any) -> Iterator[None]:
    """Attention with `bias` [B, 1, 1, S] instead of the mask of transformers, norms and convolutions that NPUs take."""
    from torch.nn import functional

    def attention(query: Any, key: Any, value: Any, *args: Any, scale: float | None = None, **options: Any) -> Any:
        scores = (query @ key.transpose(-1, -2)) * (scale or 1 / math.sqrt(query.shape[-1]))
        return (scores if bias is None else scores + bias).softmax(-1) @ value

    def conv2d(input: Any, weight: Any, bias: Any = None, stride: Any = 1, *args: Any, **options: Any) -> Any:
        # With one channel TFLite would make it a depthwise convolution, which Ethos-U55 and U65 refuse beyond stride 3.
        if input.shape[1] == 1 and max(stride if isinstance(stride, tuple) else (stride,)) > 3:
            input, weight = (functional.pad(value, (0, 0, 0, 0, 0, 1)) for value in (input, weight))
        return convolve(input, weight, bias, stride, *args, **options)

    base, convolve = model.base_model, functional.conv2d
    kept = functional.scaled_dot_product_attention, functional.layer_norm
    patched: Any = functional
    patched.scaled_dot_product_attention, patched.layer_norm, patched.conv2d = attention, _layer_norm, conv2d
    if bias is not None:
        base.get_extended_attention_mask = lambda *args, **options: bias
    try:
        yield
    finally:
        patched.scaled_dot_product_attention, patched.layer_norm = kept
        patched.conv2d = convolve
        vars(base).pop("get_extended_attention_mask", None)


def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Layer norm over the last axis with means as matrix products, which an NPU does faster than reductions."""
    import torch

    mean = torch.full((1, input.shape[-1]), 1 / input.shape[-1])
    apart = input - torch.nn.functional.linear(input, mean)
    normed = apart * torch.rsqrt(torch.nn.functional.linear(apart * apart, mean) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now


def serve(lines: Iterator[str], answer: Callable[[str], None]) -> None:
    """Answer each request until there are no more."""
    for line in lines:
        try:
            told = convert(json.loads(line))
        except Exception as error:  # noqa: BLE001 - the other side says it, and goes on
            text = " ".join(f"{type(error).__name__}: {error}".split())
            operator = re.search(r"\b(?:aten|torchvision|quantized_decomposed)[.:]+\w+", text)
            told = {"error": text[:600], "operator": operator[0] if operator else ""}
        answer(json.dumps(told))


def main() -> None:
    """Keep the answers apart from what libraries print: those go to standard error."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(text: str) -> None:
        answers.write(text + "\n")
        answers.flush()

    serve(iter(sys.stdin.readline, ""), answer)


if __name__ == "__main__":
    main()
