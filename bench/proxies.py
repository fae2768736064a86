"""How well training-free proxies rank students by what they reach once distilled, and what that saves.

    python bench/proxies.py TEACHER --data DIR --epochs 3 --name movies --work DIR [--students 24] [--limit N]

Draws shapes of a few cost classes (shares of the multiplications in the teacher's layers), each class over all depths
that can have it, with layers, heads and neurons at random; cuts and distils every one with the same settings; and
reports Kendall's tau-b between each proxy and the accuracy, and the negative KL divergence from the teacher on
validation. Intervals are 95 % bootstraps over students. `equal_depth` and `equal_cost` count only pairs of students
that have the same depth or cost class. Parameters, multiplications and depth alone are there for comparison.

Each student is trained in a process with one thread. A student that is finished is a line of WORK/students.jsonl, and a
run that is stopped goes on from there. Figures go to bench/results/proxies-NAME.json. Seconds are of CPU time, for
students with what the first of each depth takes to compute the teacher's outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd.arch import Arch, Layer
from edgekd.context import Budget, Context, Silent
from edgekd.data import DataSpec
from edgekd.distill import Distill
from edgekd.distill.teachers import predict
from edgekd.files import sha256_json
from edgekd.host import cpu_name, logical_cpus
from edgekd.pipeline.setup import prepare
from edgekd.search.proxies import PROXIES, Score, gather
from edgekd.search.proxies.diswot import diswot
from edgekd.student import Student
from edgekd.surgery import Importance, cut, measure_importance
from edgekd.surgery.sample import sample_batches
from edgekd.target import load_target

RESULTS = Path(__file__).parent / "results"
CLASSES = (0.12, 0.25, 0.45)
DEPTHS = 6
TOLERANCE = 0.06
DRAWS = 2000


@dataclass(frozen=True)
class Options:
    teacher: str
    data: str
    work: Path
    students: int
    epochs: int
    limit: int | None
    samples: int
    seed: int


@dataclass(frozen=True)
class Bench:
    """What every process has: the context of a stage, and importance to cut by."""

    ctx: Context
    importance: Importance
    metric: str
    key: str
    importance_seconds: float


def load(options: Options) -> Bench:
    setup = prepare(options.teacher, DataSpec(path=options.data, limit=options.limit), progress=Silent())
    ctx = Context(
        teacher=setup.teacher,
        task=setup.task,
        processor=setup.processor,
        train=setup.train,
        validation=setup.validation,
        test=setup.test,
        target=load_target("local"),
        budget=Budget(),
        work=options.work,
        cache=options.work / "cache",
        progress=Silent(),
        seed=options.seed,
    )
    began = time.process_time()
    importance = measure_importance(ctx.teacher, sample_batches(ctx.train, 512, seed=ctx.seed))
    seconds = time.process_time() - began
    key = sha256_json([dict(setup.key), asdict(Distill(epochs=options.epochs)), options.limit, options.seed])
    return Bench(ctx, importance, setup.metric, key, seconds)


# Shapes


class Cost:
    """Multiplications in the layers of a shape, for one example of median length; linear in heads and neurons."""

    def __init__(self, ctx: Context) -> None:
        teacher, median = ctx.teacher, int(np.argsort(ctx.train.lengths)[len(ctx.train) // 2])
        family, counted = teacher.family, _multiplications(teacher.model, ctx.train.collate(np.array([median])))
        self.per_head, self.per_neuron = [], []
        for layer, own in zip(family.layers(teacher.model), teacher.arch.layers, strict=True):
            attention = {
                id(module) for module in (*(family.qkv(layer) if family.qkv else ()), family.head_input(layer))
            }
            parts = [(id(module) in attention, counted.get(id(module), 0)) for module in layer.modules()]
            tokens = counted[id(family.neuron_input(layer))] / (own.neurons * teacher.arch.hidden)
            products = 2 * tokens**2 * teacher.arch.head_dim
            self.per_head.append(sum(n for inside, n in parts if inside) / max(own.heads, 1) + products)
            self.per_neuron.append(sum(n for inside, n in parts if not inside) / own.neurons)

    def __call__(self, arch: Arch) -> float:
        return sum(self.per_head[x.source] * x.heads + self.per_neuron[x.source] * x.neurons for x in arch.layers)


@torch.no_grad()
def _multiplications(model: Any, batch: dict[str, torch.Tensor]) -> dict[int, int]:
    """Of each linear layer and convolution, by its id."""
    found: dict[int, int] = {}
    modules = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [
        module.register_forward_hook(lambda m, _, out: found.update({id(m): m.weight[0].numel() * out.numel()}))
        for module in modules
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def design(teacher: Student, cost: Cost, students: int, seed: int) -> list[tuple[Arch, float]]:
    """Shapes with their cost classes: all depths of a class in turn, until there are enough."""
    generator, arch = np.random.default_rng(seed), teacher.arch
    fixed = [i for i in range(len(arch.layers)) if not teacher.family.droppable(teacher.model, i)]
    depths = sorted(set(np.linspace(max(len(fixed), 1), len(arch.layers), DEPTHS).round().astype(int).tolist()))
    pairs = [(depth, share) for share in CLASSES for depth in depths]
    found: list[tuple[Arch, float]] = []
    for _ in range(100):
        for depth, share in pairs:
            shape = draw(arch, fixed, depth, share * cost(arch), cost, generator)
            if shape is not None and len(found) < students and all(shape != known for known, _ in found):
                found.append((shape, share))
        if len(found) == students:
            break
    else:
        raise SystemExit(f"only {len(found)} different shapes of these costs were found, not {students}")
    return found


def draw(
    arch: Arch, fixed: Sequence[int], depth: int, wanted: float, cost: Cost, generator: np.random.Generator
) -> Arch | None:
    """A random shape of this depth and cost, or None if there is none at hand."""
    free = [i for i in range(len(arch.layers)) if i not in fixed]
    for _ in range(50):
        extra = generator.permutation(np.array(free, int))[: depth - len(fixed)].tolist()
        kept = [arch.layers[i] for i in sorted([*fixed, *extra])]
        widths = generator.uniform(0.3, 1.0, (len(kept), 2))
        low, high = 0.0, 1 / 0.3
        for _ in range(20):
            middle = (low + high) / 2
            shape = replace(arch, layers=tuple(_sized(x, w * middle) for x, w in zip(kept, widths, strict=True)))
            low, high = (middle, high) if cost(shape) < wanted else (low, middle)
        if abs(cost(shape) / wanted - 1) <= TOLERANCE:
            return shape
    return None


def _sized(layer: Layer, shares: np.ndarray) -> Layer:
    step = max(4, layer.neurons // 24 // 4 * 4)
    heads = min(max(round(layer.heads * shares[0]), min(layer.heads, 1)), layer.heads)
    neurons = min(max(round(layer.neurons * shares[1] / step), 1) * step, layer.neurons)
    return replace(layer, heads=heads, neurons=neurons)


# Training

_bench: Bench | None = None


def start(options: Options) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = load(options)


def distil(number: int, shape: dict[str, Any], epochs: int) -> dict[str, Any]:
    if _bench is None:
        raise RuntimeError("this process was not started by `start`")
    arch, ctx = Arch.from_dict(shape), _bench.ctx
    began = time.process_time()
    student = cut(ctx.teacher, arch, _bench.importance)
    work = ctx.work / f"student-{number:02}"
    own = replace(ctx, work=work, cache=cache_of(ctx.work, len(arch.layers)), notes={})
    trained = Distill(epochs=epochs).run(student, own)
    seconds = time.process_time() - began
    shutil.rmtree(work, ignore_errors=True)
    line: dict[str, Any] = {"key": _bench.key, "shape": shape, "seconds": seconds}
    line["parameters"] = sum(p.numel() for p in trained.model.parameters())
    logits = {"validation": predict(trained.model, ctx.validation)}
    if ctx.test is not None:
        logits["test"] = predict(trained.model, ctx.test)
    for split, values in logits.items():
        line[split] = ctx.task.score(values, np.asarray(getattr(ctx, split).labels))
    line["kl"] = divergence(predict(ctx.teacher.model, ctx.validation), logits["validation"])
    return line


def cache_of(work: Path, depth: int) -> Path:
    """Students of one depth look at the same layers of the teacher."""
    return work / f"cache-{depth}"


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean `KL(teacher ‖ student)` in nats of logits `[N, C]`."""
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def train_all(options: Options, shapes: Sequence[Arch], key: str, workers: int) -> list[dict[str, Any]]:
    """A line for each shape, in their order; those that are missing are trained, shallow ones first."""
    file = options.work / "students.jsonl"
    lines = finished(file)
    known = {json.dumps(line["shape"], sort_keys=True): line for line in lines if line["key"] == key}
    names = [json.dumps(shape.to_dict(), sort_keys=True) for shape in shapes]
    missing = sorted((i for i, name in enumerate(names) if name not in known), key=lambda i: len(shapes[i].layers))
    left = [len(shapes[i].layers) for i in missing]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=start, initargs=(options,)) as pool:
        jobs = {pool.submit(distil, i, shapes[i].to_dict(), options.epochs): i for i in missing}
        for job in as_completed(jobs):
            line, index = job.result(), jobs[job]
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            known[names[index]] = line
            left.remove(len(shapes[index].layers))
            if len(shapes[index].layers) not in left:
                shutil.rmtree(cache_of(options.work, len(shapes[index].layers)), ignore_errors=True)
            print(
                f"{len(shapes) - len(left)}/{len(shapes)} {shapes[index].describe()}: validation "
                f"{line['validation']:.4f}, {line['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return [known[name] for name in names]


def finished(file: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run; one that was cut off by a kill is left out."""
    found = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


# Proxies


def score_all(bench: Bench, shapes: Sequence[Arch], samples: int) -> dict[str, dict[str, Any]]:
    """Scores of all shapes by every proxy, lower is better, and the seconds they took together."""
    context = gather(bench.ctx.teacher, bench.importance, bench.ctx, samples)
    proxies: dict[str, Callable[..., Score]] = {**PROXIES, "diswot_features": partial(diswot, semantic="features")}
    found = {}
    for name, proxy in proxies.items():
        began = time.process_time()
        score = proxy(context)
        scores = [score(shape) for shape in shapes]
        found[name] = {"scores": scores, "seconds": time.process_time() - began}
        print(f"{name}: {found[name]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


def tau(scores: np.ndarray, reached: np.ndarray, pairs: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Kendall's tau-b of -scores and what was reached `[N]` over the pairs `[N, N]` that count, with its interval."""
    ours, theirs = (np.sign(values[:, None] - values[None]) * pairs for values in (-scores, reached))

    def of(rows: np.ndarray) -> float:
        a, b = ours[np.ix_(rows, rows)], theirs[np.ix_(rows, rows)]
        scale = np.sqrt(np.abs(a).sum() * np.abs(b).sum())
        return float((a * b).sum() / scale) if scale else float("nan")

    generator, every = np.random.default_rng(seed), np.arange(len(scores))
    draws = np.array([of(generator.choice(every, len(every))) for _ in range(DRAWS)])
    draws = draws[np.isfinite(draws)]
    interval = [round(float(q), 3) for q in np.quantile(draws, [0.025, 0.975])] if len(draws) else None
    value = of(every)
    return {"tau": round(value, 3) if np.isfinite(value) else None, "ci95": interval}


def agreement(scores: dict[str, np.ndarray], reached: dict[str, np.ndarray], groups: dict[str, np.ndarray]) -> Any:
    scopes = {name: values[:, None] == values[None] for name, values in groups.items()}
    return {
        name: {
            goal: {scope: tau(values, seen, pairs) for scope, pairs in scopes.items()} for goal, seen in reached.items()
        }
        for name, values in scores.items()
    }


def report(options: Options, bench: Bench, cost: Cost, shapes: Sequence[tuple[Arch, float]], lines: Any) -> Any:
    archs = [arch for arch, _ in shapes]
    proxies = score_all(bench, archs, options.samples)
    column: Callable[[str], np.ndarray] = lambda name: np.array([line[name] for line in lines])  # noqa: E731
    split = "validation" if bench.ctx.test is None else "test"
    scores = {name: np.array(found["scores"]) for name, found in proxies.items()}
    scores["parameters"] = -column("parameters")
    scores["multiplications"] = -np.array([cost(arch) for arch in archs])
    depths = np.array([len(arch.layers) for arch in archs])
    scores["depth"] = -depths
    groups = {"all": np.zeros(len(archs)), "equal_depth": depths, "equal_cost": np.array([s for _, s in shapes])}
    spent = float(column("seconds").sum())
    return {
        "what": "Kendall's tau-b of training-free proxies with what students reach once distilled",
        "settings": {
            "teacher": Path(options.teacher).name, "data": Path(options.data).name, "students": len(archs),
            "epochs": options.epochs, "limit": options.limit, "samples": options.samples, "seed": options.seed,
            "losses": dict(Distill().losses), "cost_classes": list(CLASSES), "metric": bench.metric, "split": split,
        },
        "machine": {"cpu": cpu_name(), "cpus": len(logical_cpus()), "python": platform.python_version()},
        "torch": torch.__version__,
        "tau": agreement(scores, {"accuracy": column(split), "negative_kl": -column("kl")}, groups),
        "cost": {
            "distillation_seconds": round(spent, 1),
            "importance_seconds": round(bench.importance_seconds, 1),
            "proxies": {
                name: {
                    "seconds": round(found["seconds"], 3),
                    "times_faster": round(spent / (found["seconds"] + bench.importance_seconds), 1),
                }
                for name, found in proxies.items()
            },
        },
        "students": [
            {
                "shape": arch.describe(), "layers": [layer.source for layer in arch.layers], "cost_class": share,
                "cost": round(cost(arch) / cost(bench.ctx.teacher.arch), 4),
                **{name: value for name, value in line.items() if name not in ("key", "shape")},
                "scores": {name: float(values[i]) for name, values in scores.items()},
            }
            for i, ((arch, share), line) in enumerate(zip(shapes, lines, strict=True))
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="model folder")
    parser.add_argument("--data", required=True, help="what `edgekd compress --data` takes, IDX folders included")
    parser.add_argument("--name", required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for what is finished, and the teacher's outputs"
    )
    parser.add_argument("--students", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="training examples")
    parser.add_argument("--samples", type=int, default=256, help="examples that proxies look at")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    options = Options(
        teacher=given.teacher, data=given.data, work=given.work.absolute(), students=given.students,
        epochs=given.epochs, limit=given.limit, samples=given.samples, seed=given.seed,
    )  # fmt: skip
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    bench = load(options)
    cost = Cost(bench.ctx)
    shapes = design(bench.ctx.teacher, cost, options.students, options.seed)
    lines = train_all(options, [arch for arch, _ in shapes], bench.key, given.workers)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(report(options, bench, cost, shapes, lines), indent=2)
    (RESULTS / f"proxies-{given.name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
