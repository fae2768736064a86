"""Small random models and data whose labels can be learned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from edgekd.context import Budget, Context, Silent
from edgekd.families import arch_of, family_of
from edgekd.student import Student
from edgekd.target import Target
from edgekd.tasks import TASKS
from edgekd.tasks.text_classification import EncodedText

CLASSES = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class ArrayImages:
    """Images as the tests make them: float32 `[N, 1, H, W]`."""

    images: np.ndarray
    labels: np.ndarray | None
    fingerprint: str = "images"

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self.images), np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def collate(self, indices: np.ndarray, length: int | None = None) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(self.images[indices])}

    def take(self, indices: np.ndarray) -> ArrayImages:
        return ArrayImages(self.images[indices], None if self.labels is None else self.labels[indices])


def _bert(layers: int, hidden: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=24,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config).eval()


def _vit(layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).eval()


def _resnet(hidden: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, hidden],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config).eval()


def _student(model: Any, sources: tuple[int, ...] | None = None) -> Student:
    return Student(model=model, arch=arch_of(model, sources))


def _cut(model: Any, keep: list[int]) -> Student:
    model = copy.deepcopy(model)
    family_of(model.config.model_type).set_layers(model, keep)
    return _student(model, tuple(keep))


def _texts(samples: int, seed: int) -> EncodedText:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 13, samples)
    labels = generator.integers(0, CLASSES, samples)
    ids = generator.integers(10, 40, int(lengths.sum())).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    ids[starts], ids[starts + 1] = 1, 2 + labels
    return EncodedText(
        ids=ids, types=None, starts=starts, lengths=lengths, labels=labels, padding=(0, 0), left=False, longest=24
    )


def _images(samples: int, seed: int) -> ArrayImages:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, samples)
    images = generator.normal(size=(samples, 1, 8, 8)).astype(np.float32)
    images[np.arange(samples), 0, labels] += 3
    return ArrayImages(images, labels)


def _context(teacher: Student, task: str, train: Any, validation: Any, folder: Path) -> Context:
    target = Target(name="here", title="here", runtime="onnxruntime", device="cpu", precisions=("fp32",))
    return Context(
        teacher=teacher,
        task=TASKS[task],
        processor=SimpleNamespace(hf=SimpleNamespace(all_special_ids=[0, 1, 39], unk_token_id=39)),
        train=train,
        validation=validation,
        test=None,
        target=target,
        budget=Budget(),
        work=folder / "work",
        cache=folder / "cache",
        progress=Silent(),
        seed=3,
    )


@dataclass(frozen=True)
class Case:
    """A teacher with a student of half its layers, in a context."""

    student: Student
    ctx: Context

    def at(self, folder: Path, **changes: Any) -> Context:
        """The same context with another scratch folder."""
        return replace(self.ctx, work=folder, **changes)


@pytest.fixture
def text(tmp_path: Path) -> Case:
    teacher = _bert(4, 32, 0)
    ctx = _context(_student(teacher), "text-classification", _texts(48, 1), _texts(16, 2), tmp_path)
    return Case(_cut(teacher, [0, 3]), ctx)


@pytest.fixture
def narrow_text(text: Case) -> Case:
    return Case(_student(_bert(2, 16, 5)), text.ctx)


@pytest.fixture
def image(tmp_path: Path) -> Case:
    teacher = _vit(4, 0)
    ctx = _context(_student(teacher), "image-classification", _images(40, 1), _images(12, 2), tmp_path)
    return Case(_cut(teacher, [0, 3]), ctx)


@pytest.fixture
def resnet(image: Case) -> Case:
    teacher = _student(_resnet(16, 0))
    return Case(_student(_resnet(12, 1)), replace(image.ctx, teacher=teacher))


@pytest.fixture
def texts() -> Callable[[int, int], EncodedText]:
    return _texts
