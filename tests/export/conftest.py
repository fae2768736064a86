"""Inputs for tiny models, and tiny models whose weights lie on an integer grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgekd.export.names import multiplied
from edgekd.export.onnx import export_float
from edgekd.export.parity import open_session, own_feeds
from edgekd.export.ranges import calibrate
from edgekd.student import Student, load_student


@dataclass
class Texts:
    """Random token ids; padded behind, or before with `left`."""

    names: tuple[str, ...]
    lengths: np.ndarray
    seed: int = 0
    left: bool = False
    labels: Any = None
    ids: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        self.ids = [generator.integers(5, 40, int(length)) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, indices: np.ndarray, length: int | None = None) -> dict[str, torch.Tensor]:
        width = length or int(self.lengths[indices].max())
        ids, mask = np.zeros((len(indices), width), np.int64), np.zeros((len(indices), width), np.int64)
        for row, index in enumerate(indices):
            have = len(self.ids[index])
            part = slice(width - have, None) if self.left else slice(have)
            ids[row, part], mask[row, part] = self.ids[index], 1
        whole = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return {name: torch.from_numpy(whole[name]) for name in self.names}


@dataclass
class Images:
    """Random pixels of tiny images."""

    count: int
    seed: int = 0
    labels: Any = None

    def __len__(self) -> int:
        return self.count

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(self.count, np.int64)

    def collate(self, indices: np.ndarray, length: int | None = None) -> dict[str, torch.Tensor]:
        pixels = np.random.default_rng(self.seed).normal(size=(self.count, 1, 8, 8)).astype(np.float32)
        return {"pixel_values": torch.from_numpy(pixels[indices])}


@dataclass(frozen=True)
class Snapped:
    """A student, its float graph, weights by module, calibrated ranges by tensor and other ones by module."""

    student: Student
    graph: Path
    weights: dict[str, np.ndarray]
    ranges: dict[str, tuple[float, float]]
    spans: dict[str, tuple[float, float]]
    examples: Any


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., Texts]:
    """A function that gives texts of 4 to 16 tokens, as `edgekd.tasks` would encode them."""

    def make(count: int = 12, *, seed: int = 0, left: bool = False, typed: bool = True) -> Texts:
        names = ("input_ids", "attention_mask", "token_type_ids")
        lengths = np.random.default_rng(seed).integers(4, 17, count)
        return Texts(names=names if typed else names[:2], lengths=lengths, seed=seed, left=left)

    return make


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Images]:
    """A function that gives random images of 8 x 8 pixels."""
    return lambda count=12, seed=0: Images(count=count, seed=seed)


@pytest.fixture(scope="session")
def snapped(
    make_model: Callable[..., Path], make_texts: Callable[..., Texts], make_images: Callable[..., Images],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Snapped]:  # fmt: skip
    """A function that gives a tiny model with weights on their 8-bit grid, exported and calibrated, by kind."""
    made: dict[str, Snapped] = {}

    def make(kind: str) -> Snapped:
        if kind not in made:
            text = kind in ("bert", "roberta", "electra", "distilbert")
            auto = "Sequence" if text else "Image"
            student = load_student(make_model(kind), auto_class=f"AutoModelFor{auto}Classification")
            weights = snap(student.model)
            folder = tmp_path_factory.mktemp(f"snapped-{kind}")
            task = "text-classification" if text else "image-classification"
            graph = export_float(student, task, folder / "float.onnx")
            examples = make_texts(24, seed=7) if text else make_images(24, seed=7)
            session = open_session(graph)
            feeds = [own_feeds(session, examples, np.array([index])) for index in range(len(examples))]
            ranges = calibrate(graph, feeds, operators=None)
            spans = {}
            for module, node in multiplied(onnx.load(graph)).items():
                low, high = ranges.get(node.input[0], (-3.0, 3.0))
                spans[module] = (min(low, 0.0) * 1.25, max(high, 0.0) * 1.125)  # not what calibration says
            made[kind] = Snapped(student, graph, weights, ranges, spans, examples)
        return made[kind]

    return make


def snap(model: Any) -> dict[str, np.ndarray]:
    """Put the weights of linear layers and convolutions on their grid, a fifth of them on 0; the weights by module."""
    found = {}
    generator = torch.Generator().manual_seed(3)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            rows = module.weight.data.flatten(1)
            rows = rows * (torch.rand(rows.shape, generator=generator) > 0.2)
            scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            module.weight.data = (torch.round(rows / scale) * scale).view_as(module.weight)
            found[name] = module.weight.data.numpy()
    return found
