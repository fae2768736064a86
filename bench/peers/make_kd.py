"""Plain distillation: every other layer of the teacher, trained on its logits in a bare loop, then quantized.

The loss is the Kullback-Leibler divergence to the teacher's softened answers (temperature 2) alone, the optimizer AdamW
with a linear schedule. The learning rate is the one with the best accuracy on validation.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Examples, Made, Request, main
from make_ort import quantize_fused
from torch.nn import functional

from edgekd.export.onnx import export_float
from edgekd.student import copy_processor, load_student
from edgekd.tasks import get_task, infer_task

TEMPERATURE, BATCH, WARMUP, DECAY = 2.0, 32, 0.1, 0.01


def distill(request: Request, folder: Path, *, epochs: int) -> Made:
    """Train with every rate, keep the best, export and quantize it."""
    task = get_task(infer_task(request.config))
    # One pass over the training split gives the teacher's logits for all epochs and rates.
    teacher = load_student(request.teacher, auto_class=task.auto_class)
    train, validation = request.examples("train"), request.examples("validation")
    cache = request.out / "kd-teacher.npy"
    if not cache.is_file():
        np.save(cache, answers(teacher.model, train))
    targets = torch.from_numpy(np.load(cache))
    found = {}
    for rate in request.settings["rates"]:
        kept = folder / f"{rate:g}"
        if not (kept / "facts.json").is_file():
            torch.manual_seed(0)
            model = halved(teacher.model)
            fit(model, train, targets, epochs=epochs, rate=rate)
            model.save_pretrained(kept)
            copy_processor(teacher.processor_dir, kept)
            accuracy = float((answers(model, validation).argmax(axis=1) == validation.labels).mean())
            (kept / "facts.json").write_text(json.dumps({"validation": accuracy}))
            print(f"{epochs} epochs, {rate:g}: validation {accuracy:.4f}", flush=True)
        found[rate] = json.loads((kept / "facts.json").read_text())["validation"]
    best = max(found, key=lambda rate: found[rate])
    student = load_student(folder / f"{best:g}", auto_class=task.auto_class)
    export_float(student, task.name, folder / "float.onnx")
    config = request.config | {"num_hidden_layers": len(layers_of(student.model))}
    made = quantize_fused(folder / "float.onnx", config, folder)
    settings = {"epochs": epochs, "rate": best, "validation": found, "layers": config["num_hidden_layers"]}
    return replace(made, settings={**made.settings, **settings, "temperature": TEMPERATURE, "batch": BATCH})


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The transformer layers: the list of as many modules as the config says."""
    lists = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList)]
    return next(each for each in lists if len(each) == int(model.config.num_hidden_layers))


def halved(teacher: Any) -> Any:
    """A copy with the first, third, fifth … layer."""
    model = copy.deepcopy(teacher)
    layers = layers_of(model)
    kept = list(layers)[::2]
    del layers[len(kept) :]
    for place, layer in enumerate(kept):
        layers[place] = layer
    model.config.num_hidden_layers = len(kept)
    # A teacher that edgekd has trained says there how many layers it has.
    vars(model.config).pop("edgekd", None)
    return model


def fit(model: Any, train: Examples, targets: torch.Tensor, *, epochs: int, rate: float) -> None:
    """The bare loop."""
    steps = epochs * -(-len(train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY)
    warm = max(1, int(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    model.train()
    for epoch in range(epochs):
        for indices, inputs in batches(train, shuffled(train, epoch)):
            student = functional.log_softmax(model(**inputs).logits / TEMPERATURE, dim=-1)
            teacher = functional.log_softmax(targets[torch.from_numpy(indices)] / TEMPERATURE, dim=-1)
            loss = TEMPERATURE**2 * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def shuffled(examples: Examples, seed: int) -> Any:
    """A random order in which texts of one batch are about as long as each other, which saves padding."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(examples))
    mask = examples.arrays.get("attention_mask")
    if mask is None:
        return order
    lengths, pool = mask.sum(axis=1), 32 * BATCH
    pools = [order[start : start + pool] for start in range(0, len(order), pool)]
    rows = [row for each in pools for row in np.array_split(each[np.argsort(lengths[each])], -(-len(each) // BATCH))]
    return np.concatenate([rows[place] for place in rng.permutation(len(rows))])


@torch.no_grad()
def answers(model: Any, examples: Examples) -> Any:
    """Logits [N, C] in eval mode."""
    model.eval()
    rows = [model(**inputs).logits for _, inputs in batches(examples, np.arange(len(examples)))]
    return torch.cat(rows).numpy()


def batches(examples: Examples, order: Any) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Indices and inputs of one batch after the other."""
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        yield indices, {name: torch.from_numpy(values) for name, values in examples.batch(indices).items()}


if __name__ == "__main__":
    main({"kd_3": partial(distill, epochs=3), "kd_6": partial(distill, epochs=6)}, ["torch", "transformers"])
