from __future__ import annotations

import json

import numpy as np
import pytest

from edgekd.errors import ModelError, RecipeError
from edgekd.tasks import TASKS, batches, example_feeds

TASK = TASKS["text-classification"]


@pytest.mark.parametrize("pair", [False, True])
def test_encoding_is_what_the_tokenizer_gives_one_by_one(text_model, texts, pair):
    processor = TASK.load_processor(text_model())
    rows = texts(40, pair)
    encoded = TASK.encode(processor, rows, 32)
    for index in range(40):
        one = processor.hf(*(values[index] for values in rows.columns.values()), truncation=True, max_length=32)
        batch = encoded.collate(np.array([index]))
        assert encoded.lengths[index] == len(one["input_ids"])
        for name, values in batch.items():
            assert values[0, : len(one[name])].tolist() == one[name]
    assert encoded.labels.tolist() == rows.labels.tolist()
    if pair:
        assert encoded.collate(np.arange(40))["token_type_ids"].max() == 1


def test_batches_are_padded_to_the_longest_rounded_up(text_model, texts):
    processor = TASK.load_processor(text_model(max_position_embeddings=60))
    encoded = TASK.encode(processor, texts(200), None)
    order = np.argsort(encoded.lengths)
    batch = encoded.collate(order[:5])
    assert batch["input_ids"].shape[1] == -(-encoded.lengths[order[4]] // 8) * 8
    assert {str(values.dtype) for values in batch.values()} == {"torch.int64"}
    assert batch["attention_mask"].sum(1).tolist() == encoded.lengths[order[:5]].tolist()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.hf.pad_token_id).all()
    assert encoded.collate(order[-3:])["input_ids"].shape[1] == 60
    assert encoded.collate(order[:5], length=60)["input_ids"].shape == (5, 60)
    with pytest.raises(ValueError, match="an example has 60 tokens, which does not fit 8"):
        encoded.collate(order[-3:], length=8)


def test_padding_goes_where_the_tokenizer_puts_it(text_model, texts):
    processor = TASK.load_processor(text_model())
    processor.hf.padding_side = "left"
    rows = texts(6)
    ours = TASK.encode(processor, rows, None).collate(np.arange(6))
    theirs = processor.hf(rows.columns["text"], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert (ours["input_ids"] == theirs["input_ids"]).all()
    assert (ours["attention_mask"] == theirs["attention_mask"]).all()


@pytest.mark.parametrize(
    ("family", "settings", "names", "longest"),
    [
        ("bert", {"max_position_embeddings": 40}, ["input_ids", "attention_mask", "token_type_ids"], 40),
        ("bert", {"model_max_length": 24}, ["input_ids", "attention_mask", "token_type_ids"], 24),
        ("bert", {"max_position_embeddings": 2048}, ["input_ids", "attention_mask", "token_type_ids"], 2048),
        ("distilbert", {}, ["input_ids", "attention_mask"], 512),
        (
            "roberta",
            {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
            ["input_ids", "attention_mask"],
            64,
        ),
    ],
)
def test_inputs_are_those_the_model_takes(text_model, texts, family, settings, names, longest):
    processor = TASK.load_processor(text_model(family, **settings))
    assert list(processor.input_names) == names
    assert processor.max_length == longest
    encoded = TASK.encode(processor, texts(300), None)
    assert list(encoded.collate(np.arange(3))) == names
    assert encoded.lengths.max() == min(longest, 302, encoded.lengths.max())
    feeds = example_feeds(TASK, processor, {"vocab_size": 30}, 3, 12)
    assert list(feeds) == names
    assert all(values.shape == (3, 12) and values.dtype == np.int64 for values in feeds.values())
    assert (feeds["attention_mask"] == 1).all()
    assert 5 <= feeds["input_ids"][:, 1:-1].min() <= feeds["input_ids"].max() < 30
    assert (feeds["input_ids"][:, 0] == processor.hf.cls_token_id).all()
    again = example_feeds(TASK, processor, {"vocab_size": 30}, 3, 12)
    assert all((again[name] == feeds[name]).all() for name in names)


def test_models_take_their_feeds(text_model):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    folder = text_model("roberta", max_position_embeddings=18, pad_token_id=1, type_vocab_size=1, **small)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).eval()
    feeds = example_feeds(TASK, TASK.load_processor(folder), model.config.to_dict(), 2, 16)
    with torch.no_grad():
        assert model(**{name: torch.from_numpy(values) for name, values in feeds.items()}).logits.shape == (2, 2)


def test_lengths_out_of_range_are_refused(text_model, texts):
    processor = TASK.load_processor(text_model(max_position_embeddings=40))
    with pytest.raises(RecipeError, match="max_length is 41; expected 5 to 40, the most this model takes"):
        TASK.encode(processor, texts(3), 41)
    with pytest.raises(RecipeError, match="max_length is 2; expected 5 to 40"):
        TASK.encode(processor, texts(3), 2)
    with pytest.raises(RecipeError, match="sequence is 41; expected 1 to 40"):
        example_feeds(TASK, processor, {}, 1, 41)
    with pytest.raises(RecipeError, match="batch is 0; expected at least 1"):
        example_feeds(TASK, processor, {}, 0, 4)


def test_folders_without_a_tokenizer_are_refused(text_model, tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(ModelError, match=r"void has no usable tokenizer: .*; copy config.json, tokenizer.json"):
        TASK.load_processor(tmp_path / "void")
    folder = text_model()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(ModelError, match="has no padding token"):
        TASK.load_processor(folder)


def test_a_part_is_encoded_as_the_whole(text_model, texts):
    processor = TASK.load_processor(text_model())
    rows = texts(30)
    encoded = TASK.encode(processor, rows, None)
    some = encoded.take(np.array([7, 3, 20]))
    assert len(some) == 3
    assert some.labels.tolist() == [1, 1, 0]
    assert (some.collate(np.arange(3))["input_ids"] == encoded.collate(np.array([7, 3, 20]))["input_ids"]).all()
    assert (
        encoded.fingerprint == TASK.encode(processor, rows, None).fingerprint == encoded.take(np.arange(30)).fingerprint
    )
    alone = type(rows)({"text": [rows.columns["text"][index] for index in (7, 3, 20)]})
    assert some.fingerprint == TASK.encode(processor, alone, None).fingerprint != encoded.fingerprint


def test_bucketed_batches_waste_little(text_model, texts):
    encoded = TASK.encode(TASK.load_processor(text_model()), texts(3000), None)
    cut = batches(encoded, 16, seed=0, epoch=0)
    padded = sum(encoded.collate(batch)["input_ids"].numel() for batch in cut)
    assert padded <= 1.25 * encoded.lengths.sum()
