"""Text classification: one text, or a pair of texts, and one of several classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.tasks.score import accuracy, cross_entropy
from edgekd.tasks.task import Ints, Processor, Rows, Task

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_LENGTH = 512
# Positions of these count on from the padding index, so that many of them are never used.
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet", "xmod"}
_CHUNK = 4096
_MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class EncodedText:
    """Token ids of N examples, ragged: example i is `ids[starts[i] : starts[i] + lengths[i]]`.

    Attributes:
        types: token type ids, laid out as `ids`; None if the model takes none.
        padding: (id, token type id) to pad with, and `left`: on which side.
        longest: most tokens the model may get.
        rows: what was encoded, and `picked`: which of it example i is; None where that was not kept.
    """

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.int32] | None
    starts: Ints
    lengths: Ints
    labels: Ints | None
    padding: tuple[int, int]
    left: bool
    longest: int
    rows: Rows | None = None
    picked: Ints | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids and types of all examples, in order."""
        digest = hashlib.sha256(self.lengths.tobytes())
        places = self._places(np.arange(len(self)))
        digest.update(self.ids[places].tobytes())
        digest.update(b"" if self.types is None else self.types[places].tobytes())
        return digest.hexdigest()

    def take(self, indices: Ints) -> EncodedText:
        """Some of the examples; the token ids are shared."""
        labels = None if self.labels is None else self.labels[indices]
        picked = None if self.picked is None else self.picked[indices]
        return replace(self, starts=self.starts[indices], lengths=self.lengths[indices], labels=labels, picked=picked)

    def raw(self) -> dict[str, list[str]]:
        """What was encoded, by column.

        Raises:
            DataError: the texts were not kept.
        """
        if self.rows is None or self.picked is None:
            raise DataError("these examples were encoded without keeping their texts, so they cannot be encoded anew")
        return {name: [str(values[i]) for i in self.picked] for name, values in self.rows.columns.items()}

    def again(self, processor: Processor) -> EncodedText:
        """The same texts, with the same labels and length limit, through another tokenizer.

        Raises:
            DataError: the texts were not kept.
        """
        encoded = encode(processor, _Raw(self.raw(), self.labels), self.longest)
        return replace(encoded, rows=self.rows, picked=self.picked)

    def collate(self, indices: Ints, length: int | None = None) -> dict[str, torch.Tensor]:
        """int64 tensors [B, S]: S is `length`, or the longest example rounded up to a multiple of 8.

        Raises:
            ValueError: an example is longer than `length`.
        """
        import torch

        lengths = self.lengths[indices]
        longest = int(lengths.max())
        width = min(-(-longest // _MULTIPLE) * _MULTIPLE, max(self.longest, longest)) if length is None else length
        if longest > width:
            raise ValueError(
                f"an example has {longest} tokens, which does not fit {width}; encode with max_length={width}"
            )
        column = np.arange(width)
        mask = column >= width - lengths[:, None] if self.left else column < lengths[:, None]
        places = self._places(indices)
        batch = {"input_ids": _padded(self.ids, places, mask, self.padding[0]), "attention_mask": mask.astype(np.int64)}
        if self.types is not None:
            batch["token_type_ids"] = _padded(self.types, places, mask, self.padding[1])
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _places(self, indices: Ints) -> Ints:
        lengths = self.lengths[indices]
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return np.asarray(np.repeat(self.starts[indices], lengths) + within, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Raw:
    """Texts as `encode` takes them."""

    columns: Mapping[str, list[str]]
    labels: Ints | None
    digests: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def _padded(values: npt.NDArray[np.int32], places: Ints, mask: npt.NDArray[np.bool_], padding: int) -> Ints:
    padded = np.full(mask.shape, padding, dtype=np.int64)
    padded[mask] = values[places]
    return padded


def load_processor(folder: str | Path) -> Processor:
    """The tokenizer of a model folder, and the inputs and lengths its model takes.

    Raises:
        ModelError: the folder lacks a config or tokenizer, or the tokenizer cannot pad.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config: Any = AutoConfig.from_pretrained(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{folder} has no usable tokenizer: {reason}; "
            "copy config.json, tokenizer.json and tokenizer_config.json there"
        ) from None
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {folder} has no padding token; set `pad_token` in tokenizer_config.json")
    # What optimum exports: token types only for models that tell more than one type apart.
    names = ("input_ids", "attention_mask", "token_type_ids")
    typed = (getattr(config, "type_vocab_size", 0) or 0) >= 2
    return Processor(
        hf=tokenizer,
        input_names=names if typed else names[:2],
        max_length=_max_length(tokenizer, config),
        vocabulary=min(len(tokenizer), int(config.vocab_size)),
    )


def _max_length(tokenizer: Any, config: Any) -> int:
    limits = [DEFAULT_MAX_LENGTH]
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions > 0:
        offset = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
        limits = [positions - offset]
    # Tokenizers without a limit say 1e30.
    if tokenizer.model_max_length < 1e6:
        limits.append(int(tokenizer.model_max_length))
    return min(limits)


def encode(processor: Processor, examples: Rows, max_length: int | None = None) -> EncodedText:
    """Tokenize every example once.

    Args:
        processor: what `load_processor` gave.
        examples: `text`, and `text_pair` for pairs.
        max_length: longer inputs are cut to this many tokens; None means all the model takes, at most 512.

    Raises:
        RecipeError: `max_length` is more than the model takes, or leaves no room for text.
    """
    tokenizer, longest = processor.hf, _limit(processor, max_length)
    texts, pairs = examples.columns["text"], examples.columns.get("text_pair")
    typed = "token_type_ids" in processor.input_names
    ids: list[npt.NDArray[np.int32]] = []
    types: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(texts), _CHUNK):
        piece = slice(start, start + _CHUNK)
        out = tokenizer(
            list(texts[piece]),
            None if pairs is None else list(pairs[piece]),
            truncation=True,
            max_length=longest,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=typed,
        )
        ids += [np.asarray(row, dtype=np.int32) for row in out["input_ids"]]
        types += [np.asarray(row, dtype=np.int32) for row in out["token_type_ids"]] if typed else []
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    return EncodedText(
        ids=np.concatenate(ids),
        types=np.concatenate(types) if typed else None,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=examples.labels,
        padding=(tokenizer.pad_token_id, tokenizer.pad_token_type_id),
        left=tokenizer.padding_side == "left",
        longest=longest,
        rows=examples,
        picked=np.arange(len(ids), dtype=np.int64),
    )


def _limit(processor: Processor, max_length: int | None) -> int:
    limit = processor.max_length or DEFAULT_MAX_LENGTH
    if max_length is None:
        return min(limit, DEFAULT_MAX_LENGTH)
    least = processor.hf.num_special_tokens_to_add(pair=True) + 2
    if not least <= max_length <= limit:
        raise RecipeError(f"max_length is {max_length}; expected {least} to {limit}, the most this model takes")
    return max_length


def feeds(processor: Processor, batch: int, sequence: int | None) -> dict[str, npt.NDArray[Any]]:
    """Sequences of ordinary tokens between the tokenizer's first and last: int64 [batch, sequence], no padding.

    Raises:
        RecipeError: `sequence` is more than the model takes.
    """
    limit = processor.max_length or DEFAULT_MAX_LENGTH
    length = min(limit, 128) if sequence is None else sequence
    if not 1 <= length <= limit:
        raise RecipeError(f"sequence is {length}; expected 1 to {limit}, the most this model takes")
    tokenizer, size = processor.hf, processor.vocabulary or len(processor.hf)
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(size) if token not in special] or [0], dtype=np.int64)
    ids = np.random.default_rng(0).choice(ordinary, size=(batch, length))
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if length > 2 and first is not None and last is not None and max(first, last) < size:
        ids[:, 0], ids[:, -1] = first, last
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: values[name] for name in processor.input_names}


TASK = Task(
    name="text-classification",
    kind="text",
    metric="accuracy",
    auto_class="AutoModelForSequenceClassification",
    architecture="ForSequenceClassification",
    load_processor=load_processor,
    encode=encode,
    loss=cross_entropy,
    score=accuracy,
    feeds=feeds,
)
