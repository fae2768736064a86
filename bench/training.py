"""How fast the training loop is: distillation with a warm cache, plain cross-entropy, and a bare PyTorch loop.

    python bench/training.py [--rounds 5] [--steps 60] [--threads 1] [--out bench/results/training.json]

All three train the same student on the same batches with the same settings (AdamW, bf16 autocast where the processor
has it, clipping, frozen word embeddings, no dropout) and score one batch at the end; only edgekd writes a checkpoint.
Blocks of the three are interleaved in rotating order, and each round gives one ratio, so that slow drifts of the
machine cancel; the interval is a bootstrap over rounds.

The model and texts are synthetic by default (a student of 3 layers of a 6-layer encoder of width 384, texts of 8 to 64
tokens): speed does not depend on what the numbers mean. `--teacher` and `--data` take real ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from edgekd.context import Budget, Context, Silent
from edgekd.distill import Distill
from edgekd.distill.precision import autocast, has_bf16
from edgekd.distill.schedule import rate_at
from edgekd.distill.teachers import predict
from edgekd.families import arch_of
from edgekd.student import Student
from edgekd.target import load_target
from edgekd.tasks import TASKS, batches
from edgekd.tasks.text_classification import EncodedText

CPU = torch.device("cpu")
BATCH = 32
RATE = 2e-4


def synthetic_texts(samples: int, vocabulary: int, seed: int) -> EncodedText:
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.gamma(4.0, 7.0, samples).astype(np.int64), 8, 64)
    ids = generator.integers(1, vocabulary, int(lengths.sum())).astype(np.int32)
    return EncodedText(
        ids=ids,
        types=None,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=generator.integers(0, 2, samples),
        padding=(0, 0),
        left=False,
        longest=64,
    )


def synthetic(folder: Path, samples: int) -> Context:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertForSequenceClassification(config).eval()
    teacher = Student(model=model, arch=arch_of(model))
    train, validation = (synthetic_texts(n, config.vocab_size, seed) for n, seed in ((samples, 1), (BATCH, 2)))
    return context(folder, teacher, "text-classification", train, validation)


def real(folder: Path, samples: int, teacher: str, data: str) -> Context:
    from edgekd.data import DataSpec
    from edgekd.pipeline import prepare

    setup = prepare(teacher, DataSpec(path=data, limit=samples), progress=Silent())
    return context(folder, setup.teacher, setup.task.name, setup.train, setup.validation.take(np.arange(BATCH)))


def context(folder: Path, teacher: Student, task: str, train: Any, validation: Any) -> Context:
    return Context(
        teacher=teacher,
        task=TASKS[task],
        processor=None,
        train=train,
        validation=validation,
        test=None,
        target=load_target("local"),
        budget=Budget(),
        work=folder / "work",
        cache=folder / "cache",
        progress=Silent(),
    )


def half(teacher: Student) -> Student:
    model = copy.deepcopy(teacher.model)
    keep = list(range(0, len(teacher.arch.layers), 2))
    teacher.family.set_layers(model, keep)
    return Student(model=model, arch=arch_of(model, tuple(keep)))


def bare(student: Student, ctx: Context) -> None:
    """The loop one would write by hand."""
    model = copy.deepcopy(student.model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    student.family.embeddings(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    labels = torch.from_numpy(ctx.train.labels)
    plan = batches(ctx.train, BATCH, seed=0, epoch=0, shuffle=True)
    for step, indices in enumerate(plan):
        with autocast(CPU, "bf16" if has_bf16(CPU) else "fp32"):
            logits = model(**ctx.train.collate(indices)).logits
        torch.nn.functional.cross_entropy(logits.float(), labels[torch.from_numpy(indices)]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_at(step, len(plan), warmup=0.06, schedule="linear")
        optimizer.step()
        optimizer.zero_grad()
    predict(model, ctx.validation, precision="bf16" if has_bf16(CPU) else "fp32")


def stage(losses: dict[str, Any], student: Student, ctx: Context) -> None:
    settings = Distill(epochs=1, batch_size=BATCH, learning_rate=RATE, losses=losses)
    with tempfile.TemporaryDirectory(dir=ctx.work.parent) as work:
        settings.run(student, replace(ctx, work=Path(work)))


VARIANTS: dict[str, Callable[[Student, Context], None]] = {
    "bare loop, cross-entropy": bare,
    "edgekd, cross-entropy": lambda student, ctx: stage({"cross_entropy": 1}, student, ctx),
    "edgekd, distillation": lambda student, ctx: stage(dict(Distill().losses), student, ctx),
}
BARS = {
    "edgekd, distillation / edgekd, cross-entropy": 0.9,
    "edgekd, cross-entropy / bare loop, cross-entropy": 0.95,
}


def measure(ctx: Context, rounds: int) -> dict[str, np.ndarray]:
    """Samples per second, `[rounds]` for each variant; a first round warms up cache and processor."""
    student, names = half(ctx.teacher), list(VARIANTS)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            VARIANTS[name](student, ctx)
            if turn:
                rates[name].append(len(ctx.train) / (time.perf_counter() - began))
    return {name: np.array(values) for name, values in rates.items()}


def summary(rates: dict[str, np.ndarray]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    ratios = {}
    for pair, bar in BARS.items():
        over, under = pair.split(" / ")
        values = rates[over] / rates[under]
        draws = np.median(generator.choice(values, (4000, len(values))), axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        ratios[pair] = {
            "median": float(np.median(values)),
            "ci95": [float(low), float(high)],
            "bar": bar,
            "met": bool(np.median(values) >= bar),
            "rounds": values.round(4).tolist(),
        }
    speeds = {
        name: {"samples_per_second": float(np.median(v)), "rounds": v.round(2).tolist()} for name, v in rates.items()
    }
    return {"speed": speeds, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of one block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--teacher")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        samples = given.steps * BATCH
        ctx = real(Path(folder), samples, given.teacher, given.data) if given.data else synthetic(Path(folder), samples)
        result = {
            "what": "samples per second of training, interleaved blocks",
            "settings": {"rounds": given.rounds, "steps": given.steps, "threads": given.threads, "batch_size": BATCH},
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "torch": torch.__version__,
            **summary(measure(ctx, given.rounds)),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
