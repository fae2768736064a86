"""The vocabulary stage: choose the tokens to keep, write the tokenizer, slice the word table, prove the promises."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgekd.errors import ModelError, RecipeError, StageError
from edgekd.student import quiet_transformers
from edgekd.tasks import Encoded, Processor
from edgekd.tasks.text_classification import OFFSET_POSITIONS, EncodedText
from edgekd.vocabulary.keep import kept_tokens
from edgekd.vocabulary.rewrite import Numbers, all_tokens, read_tokenizer, remapped, renumber, write_tokenizer

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.student import Student
    from edgekd.vocabulary import Vocabulary

EXAMPLES = 64
"""Training texts on which the logits must be the same bits as before."""
Flags = npt.NDArray[np.bool_]


def shrink(settings: Vocabulary, student: Student, ctx: Context) -> Student:
    """See `Vocabulary.run`."""
    table, source = _word_table(student, ctx), _source(student)
    train, validation = _texts(ctx.train), _texts(ctx.validation)
    old = read_tokenizer(source)
    tokens = all_tokens(old)
    wanted = _seen(train, tokens, settings.min_count) | _special(old, tokens, student)
    for attempt in range(2):
        numbers = renumber(tokens, kept_tokens(old["model"], wanted) | wanted)
        smaller = replace(_with_rows(student, table, numbers), processor_dir=ctx.work / "tokenizer")
        processor = _new_tokenizer(smaller, source, ctx, old, numbers)
        again = train.again(processor)
        changed = differing(train, again, numbers)
        if settings.min_count > 1 or not changed.any():
            break
        if attempt:
            raise StageError(f"{int(changed.sum())} training texts have other tokens with the smaller tokenizer")
        # Words that were unknown may now be spelt with what is left, unless all that they begin with stays too.
        wanted |= _within(tokens, train.take(np.flatnonzero(changed)), ctx.processor)
    _require_same_logits(student, smaller, train, again, changed)
    ctx.notes.update(_facts(table, numbers, changed, validation, validation.again(processor), processor))
    ctx.progress.say(
        f"vocabulary: {ctx.notes['rows_after']} of {ctx.notes['rows_before']} rows stay, "
        f"{ctx.notes['bytes_saved'] / 1e6:.1f} MB less"
    )
    return smaller


def _source(student: Student) -> Path:
    if student.processor_dir is None:
        raise RecipeError("the vocabulary stage needs the model's tokenizer, and the student comes without one")
    return student.processor_dir


def _texts(encoded: Encoded) -> EncodedText:
    if not isinstance(encoded, EncodedText) or encoded.rows is None:
        raise RecipeError("the vocabulary stage needs texts, and these examples have none: leave it out")
    return encoded


def _word_table(student: Student, ctx: Context) -> nn.Embedding:
    """The model's word embeddings.

    Raises:
        RecipeError: the task has no texts.
        ModelError: the table is used elsewhere too, or is no plain table.
    """
    if ctx.task.kind != "text":
        raise RecipeError(f"the vocabulary stage is for text, and the task is {ctx.task.name}: leave it out")
    table = student.model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise ModelError(f"the word table is a {type(table).__name__}; only a plain Embedding can be reduced")
    users = [
        name
        for name, parameter in student.model.named_parameters(remove_duplicate=False)
        if parameter.data_ptr() == table.weight.data_ptr()
    ]
    if len(users) > 1 or student.model.get_output_embeddings() is not None:
        raise ModelError(f"the word table is tied to other weights ({', '.join(users)}), so it cannot be reduced")
    return table


def _seen(train: EncodedText, tokens: Mapping[str, int], least: int) -> set[str]:
    """Tokens that the training texts have at least so many times."""
    counts = np.zeros(max(tokens.values()) + 1, dtype=np.int64)
    for i in range(len(train)):
        np.add.at(counts, ids_of(train, i), 1)
    return {token for token, index in tokens.items() if counts[index] >= least}


def ids_of(encoded: EncodedText, index: int) -> npt.NDArray[np.int32]:
    """Token ids of one example."""
    start = encoded.starts[index]
    return encoded.ids[start : start + encoded.lengths[index]]


def _special(tokenizer: Mapping[str, Any], tokens: Mapping[str, int], student: Student) -> set[str]:
    """Added tokens, and those that the settings of tokenizer and model name by their ids."""
    config = student.model.config
    ids = {value for key, value in config.to_dict().items() if key.endswith("_token_id") and type(value) is int}
    ids |= {token["id"] for token in tokenizer.get("added_tokens") or ()} | _numbers_in(tokenizer.get("post_processor"))
    ids |= {(tokenizer.get("padding") or {}).get("pad_id", -1)}
    if config.model_type in OFFSET_POSITIONS:
        # Their positions count on from the id of padding, which therefore must not move.
        ids |= set(range((config.pad_token_id or 0) + 1))
    return {token for token, index in tokens.items() if index in ids}


def _numbers_in(processor: Any) -> set[int]:
    """Token ids in a post-processor: `ids` of special tokens, and the second of `[token, id]`."""
    found: set[int] = set()
    if isinstance(processor, dict):
        ids = processor.get("ids")
        found.update(ids if isinstance(ids, list) else ())
        found.update(processor[key][1] for key in ("sep", "cls") if isinstance(processor.get(key), list))
        processor = list(processor.values())
    for part in processor if isinstance(processor, list) else ():
        found |= _numbers_in(part)
    return found


def _with_rows(student: Student, table: nn.Embedding, numbers: Numbers) -> Student:
    """A copy of the student whose word table has the kept rows, in their new order.

    Raises:
        ModelError: padding would get another id where positions count on from it.
    """
    config = student.model.config
    if config.model_type in OFFSET_POSITIONS and numbers.get(config.pad_token_id) != config.pad_token_id:
        raise ModelError(f"{config.model_type} counts positions from the padding id, {config.pad_token_id}; the "
                         "tokenizer has no such token, so the vocabulary cannot be reduced")  # fmt: skip
    rows = [old for old in sorted(numbers) if old < table.num_embeddings]
    padding = None if table.padding_idx is None else numbers.get(table.padding_idx)
    smaller = nn.Embedding(len(rows), table.embedding_dim, padding, max_norm=table.max_norm, device="meta")
    smaller.weight = nn.Parameter(table.weight.data[torch.tensor(rows)].clone())
    # Found among what is copied already, so that the large table is not.
    model = copy.deepcopy(student.model, {id(table): smaller.train(table.training)})
    for key, value in remapped(config.to_dict(), numbers).items():
        if key.endswith("_token_id"):
            setattr(model.config, key, value)
    model.config.vocab_size = len(rows)
    return student.with_model(model)


def _new_tokenizer(student: Student, source: Path, ctx: Context, old: Mapping[str, Any], numbers: Numbers) -> Processor:
    """Write the student's tokenizer and load it as everyone else will.

    Raises:
        StageError: it has other tokens or other ids than planned.
    """
    folder = _source(student)
    write_tokenizer(source, folder, old, numbers)
    with quiet_transformers():
        student.model.config.save_pretrained(folder)
        processor = ctx.task.load_processor(folder)
    planned = {token: numbers[index] for token, index in all_tokens(old).items() if index in numbers}
    if processor.hf.get_vocab() != planned:
        wrong = sorted(set(processor.hf.get_vocab().items()) ^ set(planned.items()))[:3]
        raise StageError(f"the smaller tokenizer was not read as it was written: {wrong} …")
    return processor


def differing(before: EncodedText, after: EncodedText, numbers: Numbers) -> Flags:
    """Which texts `[N]` have other tokens with the new tokenizer."""
    olds = np.array(sorted(numbers), dtype=np.int64)
    return np.array([not np.array_equal(ids_of(before, i), olds[ids_of(after, i)]) for i in range(len(before))], bool)


def _within(tokens: Collection[str], texts: EncodedText, processor: Processor) -> set[str]:
    """All tokens that are spelt out somewhere in these texts."""
    normalizer = processor.hf.backend_tokenizer.normalizer
    lines = [text for column in texts.raw().values() for text in column]
    lines += [normalizer.normalize_str(text) for text in lines] if normalizer is not None else []
    joined = "\n".join(lines).replace(" ", "▁")
    return {token for token in tokens if (token.removeprefix("##") or token) in joined}


@torch.no_grad()
def _require_same_logits(before: Student, after: Student, old: EncodedText, new: EncodedText, changed: Flags) -> None:
    sample = np.flatnonzero(~changed)[:EXAMPLES]
    if not len(sample):
        return
    logits = [student.model.eval()(**texts.collate(sample)).logits for student, texts in ((before, old), (after, new))]
    if not torch.equal(*logits):
        raise StageError(f"the smaller word table changes the logits by {(logits[0] - logits[1]).abs().max():.2e}")


def _facts(
    table: nn.Embedding, numbers: Numbers, changed: Flags, old: EncodedText, new: EncodedText, processor: Processor
) -> dict[str, Any]:
    """What goes into the ledger.

    Raises:
        StageError: validation has more unknown tokens than before.
    """
    unknown = processor.hf.unk_token_id
    back = {new_id: old_id for old_id, new_id in numbers.items()}
    before = 0 if unknown is None else _count(old, back[unknown])
    after = 0 if unknown is None else _count(new, unknown)
    if after > before:
        raise StageError(
            f"the validation texts have {after} unknown tokens with the smaller tokenizer, not {before}: "
            "this tokenizer cannot spell out what it drops, so leave the vocabulary stage out"
        )
    rows = sum(old_id < table.num_embeddings for old_id in numbers)
    return {
        "rows_before": table.num_embeddings,
        "rows_after": rows,
        "bytes_saved": (table.num_embeddings - rows) * table.embedding_dim * table.weight.element_size(),
        "train_changed": float(changed.mean()),
        "validation_changed": float(differing(old, new, numbers).mean()),
        "unknown_before": before,
        "unknown_after": after,
    }


def _count(encoded: EncodedText, token: int) -> int:
    return sum(int((ids_of(encoded, i) == token).sum()) for i in range(len(encoded)))
