from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORDS = [f"w{number}" for number in range(40)]


@dataclass(frozen=True)
class Rows:
    columns: dict[str, Any]
    labels: Any = None
    digests: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@pytest.fixture
def text_model(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a config of some family and a tokenizer of 45 tokens."""

    def make(family: str = "bert", **settings: Any) -> Path:
        from transformers import AutoConfig, BertTokenizerFast

        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        limit = settings.pop("model_max_length", int(1e30))
        BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=limit).save_pretrained(folder)
        AutoConfig.for_model(family, vocab_size=45, **settings).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def texts() -> Callable[..., Rows]:
    """Texts whose lengths have a long tail."""

    def make(count: int, pair: bool = False) -> Rows:
        rng = np.random.default_rng(0)
        lengths = np.minimum(rng.lognormal(2.5, 0.8, size=count).astype(int) + 1, 300)
        columns = {"text": [" ".join(rng.choice(WORDS, size=length)) for length in lengths]}
        if pair:
            columns["text_pair"] = [" ".join(rng.choice(WORDS, size=3)) for _ in range(count)]
        return Rows(columns, np.arange(count) % 2)

    return make


@pytest.fixture
def image_model(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a config and the image processor its family uses."""

    def make(family: str = "vit", size: int = 16, channels: int = 3, **settings: Any) -> Path:
        from transformers import AutoConfig, ConvNextImageProcessor, DeiTImageProcessor, ViTImageProcessor

        folder = tmp_path / f"{family}{size}x{channels}"
        colours = {"image_mean": [0.4, 0.5, 0.45][:channels], "image_std": [0.2, 0.3, 0.25][:channels]}
        square = {"height": size, "width": size}
        if family == "resnet":
            processor = ConvNextImageProcessor(**{"size": {"shortest_edge": size}, **colours, **settings})
        elif family == "deit":
            larger = {"height": size + 4, "width": size + 4}
            processor = DeiTImageProcessor(**{"size": larger, "crop_size": square, **colours, **settings})
        else:
            processor = ViTImageProcessor(**{"size": square, **colours, **settings})
        processor.save_pretrained(folder)
        shape = {} if family == "resnet" else {"image_size": size}
        AutoConfig.for_model(family, num_channels=channels, **shape).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def rows() -> type[Rows]:
    return Rows
