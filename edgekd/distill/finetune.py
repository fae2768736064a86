"""Make a teacher: train a base model, or a small one from scratch, on labelled data with the one training loop."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le

from edgekd.context import Progress, Silent
from edgekd.data import DataSpec, Examples, Splits, load_splits, require_labels
from edgekd.distill.augment import AUGMENTATIONS
from edgekd.distill.bounds import problems
from edgekd.distill.job import Batch, Job
from edgekd.distill.loop import train
from edgekd.distill.precision import choose_precision
from edgekd.distill.processes import this_process
from edgekd.distill.scratch import PREFIX, make_scratch
from edgekd.distill.settings import Loop, Training
from edgekd.distill.teachers import predict
from edgekd.errors import DataError, EdgekdError, ModelError, RecipeError, unknown
from edgekd.families import arch_of, family_of
from edgekd.files import explained, publish, require_place, sha256_json, write_json
from edgekd.student import Student, local_folder, quiet_transformers, read_config, require_weights
from edgekd.tasks import TASKS, Encoded, Task, batches

RECORD = "finetune.json"


@dataclass(frozen=True, kw_only=True)
class Finetune(Loop):
    """Settings of `finetune`; those it shares with `Distill` mean the same.

    `learning_rate` unset is 5e-5 for a base model and 1e-3 from scratch. `max_length` is in tokens. `augment` moves
    images at random, or also mirrors them.
    """

    epochs: Annotated[int, Ge(1)] = 3
    learning_rate: Annotated[float, Gt(0)] | None = None
    max_length: Annotated[int, Ge(1)] | None = None
    augment: Literal["none", "shift", "shift_flip"] = "none"
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1

    def __post_init__(self) -> None:
        """Check all settings.

        Raises:
            RecipeError: names all that are wrong.
        """
        if wrong := list(problems(self)):
            raise RecipeError("; ".join(wrong))


def finetune_settings(values: Mapping[str, Any]) -> Finetune:
    """Make settings from plain values.

    Raises:
        RecipeError: a name or a value is wrong.
    """
    names = [field.name for field in dataclasses.fields(Finetune)]
    wrong = [unknown("setting", name, names) for name in values if name not in names]
    if wrong:
        raise RecipeError("; ".join(wrong))
    return Finetune(**values)


def finetune(
    base: str, spec: DataSpec, out: Path, *, settings: Finetune, seed: int, progress: Progress
) -> dict[str, Any]:
    """Train `base` on the data's labels and write a transformers folder to `out`.

    Args:
        base: a model folder or hub id, whose head may be new, or `scratch:NAME` with a name of `SCRATCH` (images).
        spec: the data, with labels.
        out: the folder to write; a folder this function wrote before is replaced.
        settings: of the training.
        seed: of new weights, the order of examples, dropout and augmentation.
        progress: where to report.

    Returns:
        `folder`, `task`, `metric`, its value on `validation` and, if there is such a split, on `test`; `steps`.

    Raises:
        ModelError: the base cannot be used, for instance because it has no weights.
        RecipeError: the settings do not suit a model of texts.
        DataError: the data cannot be used, or has no labels.
        StoreError: `out` cannot be written.
    """
    require_place(out, marker=RECORD, why="edgekd finetune did not write it")
    progress = progress if this_process().main else Silent()
    if (out / RECORD).is_file():
        progress.say(f"{out} has an earlier teacher, which this one will replace")
    with _work(out) as work:
        return _teach(base, spec, out, work, settings=settings, seed=seed, progress=progress)


@contextmanager
def _work(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out`; a kill leaves it, to go on from, anything else takes it away."""
    work = out.absolute().parent / f".{out.name}.work"
    with explained("write", work):
        work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    except EdgekdError:
        _remove(work)
        raise
    _remove(work)


def _remove(work: Path) -> None:
    if this_process().main:
        shutil.rmtree(work, ignore_errors=True)


def _teach(
    base: str, spec: DataSpec, out: Path, work: Path, *, settings: Finetune, seed: int, progress: Progress
) -> dict[str, Any]:
    scratch = base.startswith(PREFIX)
    folder = work / "base" if scratch else _base(base)
    task = TASKS["image-classification"] if scratch else _task(folder)
    if settings.augment != "none" and task.kind == "text":
        raise RecipeError(f"augment: {settings.augment} moves images, and {base} reads texts; leave it out")
    splits = load_splits(spec, kind=task.kind, id2label=None)
    for note in splits.notes:
        progress.say(f"data: {note}")
    if scratch:
        make_scratch(base.removeprefix(PREFIX), splits.train.columns["image"], folder)
    torch.manual_seed(seed)
    model = _model(folder, task, _names(splits), scratch=scratch)
    rate = settings.learning_rate or (1e-3 if scratch else 5e-5)
    result = _train(model, folder, task, splits, work, settings, rate, seed, progress)
    facts = {"folder": str(out), "base": base, "task": task.name, "metric": task.metric, **result, "seed": seed}
    if this_process().main:
        student = Student(model=model.cpu().eval(), arch=arch_of(model), processor_dir=folder)
        student.save(work / "model")
        write_json(work / "model" / RECORD, facts)
        publish(work / "model", out, marker=RECORD)
    return facts


def _base(base: str) -> Path:
    folder = local_folder(base)
    family_of(str(read_config(folder).get("model_type")))
    try:
        require_weights(folder)
    except ModelError as error:
        raise ModelError(f"{error}; for images, scratch:vit or scratch:resnet starts without a base") from None
    return folder


def _task(folder: Path) -> Task:
    """Text if the base knows tokens, else images: a base need not have a head that tells."""
    return TASKS["text-classification" if "vocab_size" in read_config(folder) else "image-classification"]


def _names(splits: Splits) -> dict[int, str]:
    require_labels(splits, "train")
    if len(splits.label_names) < 2:
        raise DataError(f"the data has {len(splits.label_names)} class; a classifier needs at least 2")
    return dict(enumerate(splits.label_names))


def _model(folder: Path, task: Task, names: dict[int, str], *, scratch: bool) -> Any:
    import transformers

    auto = getattr(transformers, task.auto_class)
    labels = {
        "num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()},
        "problem_type": "single_label_classification",
    }  # fmt: skip
    with quiet_transformers():
        try:
            if scratch:
                return auto.from_config(transformers.AutoConfig.from_pretrained(folder, **labels))
            return auto.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{folder} cannot be loaded as {task.auto_class}: {error}") from None


def _train(
    model: Any,
    folder: Path,
    task: Task,
    splits: Splits,
    work: Path,
    settings: Finetune,
    rate: float,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Train the model in place; its metric on validation and test, and the steps taken."""
    processor = task.load_processor(folder)

    def encode(examples: Examples) -> Encoded:
        return task.encode(processor, examples, settings.max_length)

    data, validation = encode(require_labels(splits, "train")), encode(require_labels(splits, "validation"))
    labels = torch.from_numpy(_known(data))
    precision = choose_precision(settings.precision, this_process().device, model)
    job = Job(
        modules=model,
        plan=lambda epoch: batches(data, settings.batch_size, seed=seed, epoch=epoch, shuffle=True),
        collate=lambda indices: _augmented(data.collate(indices), settings.augment),
        loss=lambda batch, i: task.loss(model(**batch).logits, labels[torch.from_numpy(i)].to(model.device)),
        evaluate=lambda: task.score(predict(model, validation, precision=precision), _known(validation)),
        fingerprint=sha256_json([splits.fingerprint, data.fingerprint, rate, dataclasses.asdict(settings)]),
    )
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Loop)}
    loop = Training(learning_rate=rate, **shared)
    outcome = train(job, loop, seed=seed, work=work, progress=progress)
    score = task.score(predict(model, validation), _known(validation))
    result: dict[str, Any] = {"validation": score, "steps": outcome.steps}
    if splits.test is not None and splits.test.labels is not None:
        test = encode(require_labels(splits, "test"))
        result["test"] = task.score(predict(model, test), _known(test))
    return result


def _known(data: Encoded) -> np.ndarray:
    """Labels int64 `[N]` of data that has them all."""
    return np.asarray(data.labels, np.int64)


def _augmented(batch: Batch, name: str) -> Batch:
    if name == "none" or "pixel_values" not in batch:
        return batch
    return {**batch, "pixel_values": AUGMENTATIONS[name](batch["pixel_values"])}
