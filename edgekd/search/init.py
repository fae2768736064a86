"""Other checkpoints as students: small models that were trained by themselves, instead of cuts of the teacher.

Turc et al. 2019, "Well-Read Students Learn Better", arXiv 1908.08962: at small sizes a pre-trained compact model
that is distilled beats one that starts from a part of a large model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgekd.arch import Arch
from edgekd.errors import ModelError, RecipeError
from edgekd.families import arch_of, family_of
from edgekd.student import (
    SECTION,
    Student,
    load_student,
    local_folder,
    quiet_transformers,
    read_config,
    require_weights,
)
from edgekd.tasks import Processor

if TYPE_CHECKING:
    from edgekd.context import Context

SINGLE = "single_label_classification"
_POOLER = ".pooler."


def candidates(paths: Sequence[str | Path], ctx: Context) -> list[Student]:
    """Load checkpoints as students of the context's teacher, in the order given.

    A student has the teacher's classes and processor files, and a head of its own: what a checkpoint lacks of it, or
    has for other classes, is drawn from `ctx.seed`. No layer of it comes from the teacher, so the `source` of its
    layers counts on from the teacher's last; `layer_map: source` then matches layers as `even` does.

    Args:
        paths: model folders or hub ids, with safetensors weights of a known family.
        ctx: the teacher, the task and its data.

    Raises:
        ModelError: a checkpoint cannot be loaded, or lacks weights below its head.
        RecipeError: a checkpoint does not take what the teacher takes; the message names the difference.
    """
    return [_candidate(path, ctx) for path in paths]


def _candidate(path: str | Path, ctx: Context) -> Student:
    folder = local_folder(str(path))
    config = read_config(folder)
    family_of(str(config.get("model_type")))
    require_weights(folder)
    if ("vocab_size" in config) != (ctx.task.kind == "text"):
        takes = "text" if "vocab_size" in config else "images"
        raise RecipeError(f"{folder} takes {takes}, and the teacher's task is {ctx.task.name}; choose another student")
    check = _check_text if ctx.task.kind == "text" else _check_images
    check(folder, config, ctx)
    if "arch" in config.get(SECTION, {}):
        return _own(folder, ctx)
    model = _with_head(folder, config, ctx)
    return _student(model, arch_of(model), ctx)


def _student(model: Any, arch: Arch, ctx: Context) -> Student:
    first = len(ctx.teacher.arch.layers)
    layers = tuple(replace(layer, source=first + i) for i, layer in enumerate(arch.layers))
    return Student(model=model.eval(), arch=replace(arch, layers=layers), processor_dir=ctx.teacher.processor_dir)


def _own(folder: Path, ctx: Context) -> Student:
    """A student that edgekd wrote before: of any shape, with a finished head."""
    student = load_student(folder, auto_class=ctx.task.auto_class)
    ours, theirs = _names(student.model.config.id2label), _names(ctx.teacher.model.config.id2label)
    if ours != theirs:
        raise RecipeError(f"{folder} has the classes {_listed(ours)}, and the teacher {_listed(theirs)}")
    return _student(student.model, student.arch, ctx)


def _with_head(folder: Path, config: Mapping[str, Any], ctx: Context) -> Any:
    """The model in float32, with a head for the teacher's classes.

    Raises:
        ModelError: the folder cannot be read as such a model, or lacks weights below the head.
    """
    import transformers
    from safetensors import SafetensorError

    names = _names(ctx.teacher.model.config.id2label)
    kind = ctx.teacher.model.config.problem_type
    labels = {
        "num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()},
        "problem_type": kind,
    }  # fmt: skip
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)
        try:
            model, report = getattr(transformers, ctx.task.auto_class).from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
                ignore_mismatched_sizes=True, output_loading_info=True, **labels,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ModelError(f"{folder} cannot be loaded as {ctx.task.auto_class}: {error}") from None
        _require_body(model, report, folder)
        if _own_names(folder) != names or config.get("problem_type") not in (None, SINGLE, kind):
            for module in _head(model):
                model._init_weights(module)
    return model


def _own_names(folder: Path) -> dict[int, str]:
    """The classes a checkpoint was saved with; transformers leaves the usual two out of the file."""
    from transformers import AutoConfig

    return _names(AutoConfig.from_pretrained(folder, trust_remote_code=False).id2label)


def _require_body(model: Any, report: Mapping[str, Any], folder: Path) -> None:
    prefix = f"{model.base_model_prefix}."
    lacking = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    body = sorted(key for key in lacking if key.startswith(prefix) and _POOLER not in key)
    if body:
        raise ModelError(
            f"{folder} lacks weights of {type(model).__name__} below its head ({', '.join(body[:3])} …): "
            "a student must be trained that far"
        )


def _head(model: Any) -> list[Any]:
    body = {id(module) for module in model.base_model.modules()}
    return [module for module in model.modules() if id(module) not in body and not list(module.children())]


def _check_text(folder: Path, config: Mapping[str, Any], ctx: Context) -> None:
    """Same tokens under the same numbers, same inputs, and room for the longest text."""
    own, teacher = ctx.task.load_processor(folder), _teacher_processor(ctx)
    theirs, ours = teacher.hf.get_vocab(), own.hf.get_vocab()
    other = sorted((number, token) for token, number in theirs.items() if ours.get(token) != number)
    if other:
        number, token = other[0]
        found = f"{ours[token]}" if token in ours else "missing"
        raise RecipeError(
            f"{folder} has another tokenizer than the teacher: token {token!r} is {number} there and {found} here "
            f"({len(other)} of {len(theirs)} tokens differ); choose a student with the teacher's vocabulary"
        )
    if max(theirs.values()) >= int(config["vocab_size"]):
        raise RecipeError(
            f"{folder} knows {config['vocab_size']} tokens, and the teacher's tokenizer has {len(theirs)}; "
            "choose a student with the teacher's vocabulary"
        )
    if own.input_names != teacher.input_names:
        raise RecipeError(
            f"{folder} takes {', '.join(own.input_names)}, and the teacher {', '.join(teacher.input_names)}; "
            "choose a student with the teacher's inputs"
        )
    parts = [part for part in (ctx.train, ctx.validation, ctx.test) if part is not None and len(part)]
    longest = max(int(part.lengths.max()) for part in parts)
    if own.max_length is not None and longest > own.max_length:
        raise RecipeError(
            f"{folder} takes at most {own.max_length} tokens, and the data has {longest}; give a smaller max_length"
        )


def _check_images(folder: Path, config: Mapping[str, Any], ctx: Context) -> None:
    """Same channels, and the same size where position embeddings fix it."""
    shape = _teacher_processor(ctx).shape or (0, 0, 0)
    channels = int(config.get("num_channels", 3))
    if channels != shape[0]:
        raise RecipeError(f"{folder} takes images of {channels} channels, and the teacher of {shape[0]}")
    places = family_of(str(config["model_type"])).places
    if places is None:
        return
    size = config.get("image_size", shape[1])
    height, width = size if isinstance(size, list) else (size, size)
    if (height, width) != shape[1:]:
        raise RecipeError(f"{folder} takes images of {height}x{width}, and the teacher of {shape[1]}x{shape[2]}")


def _teacher_processor(ctx: Context) -> Processor:
    """The processor of the run, or the one beside the teacher's weights.

    Raises:
        ModelError: there is neither.
    """
    if ctx.processor is not None:
        processor: Processor = ctx.processor
        return processor
    if ctx.teacher.processor_dir is None:
        raise ModelError("the teacher has no tokenizer or image processor to compare other checkpoints with")
    return ctx.task.load_processor(ctx.teacher.processor_dir)


def _names(id2label: Mapping[Any, str]) -> dict[int, str]:
    return {int(index): str(name) for index, name in id2label.items()}


def _listed(names: Mapping[int, str]) -> str:
    return ", ".join(list(names.values())[:5])
