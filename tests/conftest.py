"""Tiny random models of every family, saved as Hugging Face folders, and data to go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(40)), "good", "bad"]
TEXT_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE_SHAPE = {**TEXT_SHAPE, "image_size": 8, "patch_size": 4, "num_channels": 1}
RESNET = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 3]}
LABELS = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
TEXT_KINDS = ("bert", "roberta", "xlm-roberta", "electra", "electra-wide", "distilbert")
IMAGE_KINDS = ("vit", "deit", "resnet", "resnet-bottleneck")


def _config(kind: str) -> Any:
    import transformers as t

    text = {"vocab_size": len(WORDS), "max_position_embeddings": 40, "pad_token_id": 0, **TEXT_SHAPE, **LABELS}
    makers: dict[str, Callable[[], Any]] = {
        "bert": lambda: t.BertConfig(**text),
        "roberta": lambda: t.RobertaConfig(**{**text, "type_vocab_size": 1}),
        "xlm-roberta": lambda: t.XLMRobertaConfig(**{**text, "type_vocab_size": 1}),
        "electra": lambda: t.ElectraConfig(**text, embedding_size=16),
        "electra-wide": lambda: t.ElectraConfig(**text, embedding_size=32),
        "distilbert": lambda: t.DistilBertConfig(
            vocab_size=len(WORDS), max_position_embeddings=40, dim=32, n_layers=3, n_heads=4, hidden_dim=64, **LABELS
        ),
        "vit": lambda: t.ViTConfig(**IMAGE_SHAPE, **LABELS),
        "deit": lambda: t.DeiTConfig(**IMAGE_SHAPE, **LABELS, architectures=["DeiTForImageClassification"]),
        "resnet": lambda: t.ResNetConfig(**RESNET, layer_type="basic", **LABELS),
        "resnet-bottleneck": lambda: t.ResNetConfig(**RESNET, layer_type="bottleneck", **LABELS),
    }
    return makers[kind]()


def _save_processor(kind: str, folder: Path) -> None:
    import transformers as t

    if kind in TEXT_KINDS:
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(WORDS), encoding="utf-8")
        t.BertTokenizerFast(str(vocabulary), model_max_length=32).save_pretrained(folder)
        return
    size = {"height": 8, "width": 8}
    t.ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the folder of a tiny random model; the same folder for the same kind."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        import torch
        import transformers as t

        if kind not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(kind)
            task = "Sequence" if kind in TEXT_KINDS else "Image"
            model = getattr(t, f"AutoModelFor{task}Classification").from_config(_config(kind))
            for parameter in model.parameters():
                # Larger weights than at initialization, so that every part of the model matters to the logits.
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(folder)
            _save_processor(kind, folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of jsonl splits whose label is told by one word."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    for split, count in (("train", 96), ("validation", 32), ("test", 40)):
        lines = []
        for i in range(count):
            words = [f"word{n}" for n in generator.integers(0, 40, generator.integers(2, 12))]
            words.insert(int(generator.integers(0, len(words))), "good" if i % 2 else "bad")
            lines.append(json.dumps({"text": " ".join(words), "label": i % 2}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def one_thread() -> Any:
    """Single-threaded torch, for bitwise repeatability."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
