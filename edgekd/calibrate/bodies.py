"""Bodies: full-size models with random weights, from which the shapes to be timed are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekd.errors import RecipeError, unknown
from edgekd.families import arch_of, family_of
from edgekd.student import Student, load_student, read_config
from edgekd.surgery import Importance
from edgekd.tasks import get_task, infer_task

SMALL_TABLE = 1024
"""Rows of the word table in models that are only timed: a lookup costs the same, the export much less."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """One full-size model. `image` is the side of its square images in pixels; None for text."""

    name: str
    task: str
    student: Student
    image: int | None = None

    @property
    def model_type(self) -> str:
        """The transformers model type, which decides how graphs are fused."""
        return str(self.student.model.config.model_type)

    @property
    def tokens(self) -> int | None:
        """Tokens of one image where it is cut into patches; None where the length is free or there are none."""
        patch = getattr(self.student.model.config, "patch_size", None)
        if self.image is None or patch is None:
            return None
        extra = 2 if self.model_type == "deit" else 1
        return int((self.image // patch) ** 2) + extra

    @property
    def outline(self) -> str:
        """What tells bodies apart whose layers differ from each other (convolutional nets); empty otherwise."""
        layers = self.student.arch.layers
        if layers[0].heads:
            return ""
        widths = [layer.neurons for layer in layers]
        config, channels = self.student.model.config, self.student.arch.channels
        if channels != (config.embedding_size, *config.hidden_sizes):
            widths += channels
        return f"{self.image}px " + "-".join(map(str, widths))

    @property
    def importance(self) -> Importance:
        """Any scores do: time does not depend on which heads and neurons are kept."""
        layers = self.student.arch.layers
        return Importance(
            heads=tuple(torch.ones(layer.heads) for layer in layers),
            neurons=tuple(torch.ones(layer.neurons) for layer in layers),
            layers=torch.ones(len(layers)),
            hidden=torch.ones(self.student.arch.hidden),
        )


def bert(hidden: int, heads: int, *, depth: int = 8) -> Body:
    """A BERT classifier with random weights; the feed-forward networks are four times as wide as `hidden`."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=SMALL_TABLE,
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    return _body(f"bert-{hidden}-{heads}", "text-classification", BertForSequenceClassification, config)


def vit(hidden: int, heads: int, image: int, *, patch: int = 16, depth: int = 8) -> Body:
    """A vision transformer with random weights for square images of `image` pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        image_size=image,
        patch_size=patch,
    )
    return _body(f"vit-{hidden}-{heads}-{image}", "image-classification", ViTForImageClassification, config, image)


def resnet(widths: Sequence[int], depths: Sequence[int], image: int) -> Body:
    """A ResNet of basic blocks with random weights for square images of `image` pixels."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=widths[0], hidden_sizes=list(widths), depths=list(depths), layer_type="basic")
    name = f"resnet-{'-'.join(map(str, widths))}-{image}"
    return _body(name, "image-classification", ResNetForImageClassification, config, image)


STANDARD: dict[str, Callable[[], Body]] = {
    "bert-128": lambda: bert(128, 4),
    "bert-256": lambda: bert(256, 8),
    "bert-384": lambda: bert(384, 12),
    "bert-512": lambda: bert(512, 16),
    "bert-768": lambda: bert(768, 12, depth=6),
    "vit-192-96": lambda: vit(192, 3, 96),
    "vit-192-224": lambda: vit(192, 3, 224),
    "vit-384-96": lambda: vit(384, 6, 96),
    "vit-384-224": lambda: vit(384, 6, 224),
    "resnet-18-64": lambda: resnet((64, 128, 256, 512), (2, 2, 2, 2), 64),
}
"""Bodies by name: family, hidden size and, for images, their side in pixels."""


def find_body(name: str) -> Body:
    """A standard body, or the one of a model folder: its own shapes.

    Raises:
        RecipeError: neither.
        ModelError: the folder cannot be used.
    """
    if name in STANDARD:
        return STANDARD[name]()
    folder = Path(name)
    if not folder.is_dir():
        raise RecipeError(f"{unknown('body', name, STANDARD)}; or give a model folder")
    return body_of(folder)


def body_of(folder: Path) -> Body:
    """The body of a model folder, with a small word table."""
    config = read_config(folder)
    task = get_task(infer_task(config))
    student = small_vocabulary(load_student(folder, auto_class=task.auto_class))
    image = None
    if task.kind == "image":
        shape = task.load_processor(folder).shape
        image = shape[-1] if shape is not None else None
    return Body(name=folder.name, task=task.name, student=student, image=image)


def body_of_student(student: Student, task: str) -> Body:
    """The body of a student in memory: what is timed has its shapes and a small word table."""
    image = None
    if get_task(task).kind == "image" and student.processor_dir is not None:
        shape = get_task(task).load_processor(student.processor_dir).shape
        image = shape[-1] if shape is not None else None
    return Body(name="student", task=task, student=small_vocabulary(student), image=image)


def small_vocabulary(student: Student) -> Student:
    """The student with at most `SMALL_TABLE` words; its own table is not touched."""
    table = student.family.embeddings(student.model)
    if not isinstance(table, nn.Embedding) or table.num_embeddings <= SMALL_TABLE:
        return student
    model = copy.deepcopy(student.model)
    small = nn.Embedding(SMALL_TABLE, table.embedding_dim)
    with torch.no_grad():
        small.weight.copy_(table.weight[:SMALL_TABLE])
    model.set_input_embeddings(small)
    model.config.vocab_size = SMALL_TABLE
    return student.with_model(model)


def _body(name: str, task: str, model_class: Any, config: Any, image: int | None = None) -> Body:
    family_of(config.model_type)
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        # Fresh biases are all zero, and optimizers of graphs make one constant of them, which no trained model has.
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return Body(name=name, task=task, student=Student(model=model, arch=arch_of(model)), image=image)
