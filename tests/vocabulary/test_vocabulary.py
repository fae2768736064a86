"""Laws of the smaller vocabulary, on tokenizers of three kinds that are trained here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgekd.context import Budget, Context, Silent
from edgekd.data import Examples
from edgekd.errors import DataError, ModelError, RecipeError, StageError
from edgekd.student import Student, load_student
from edgekd.target import Target
from edgekd.tasks import get_task
from edgekd.vocabulary import Vocabulary, keep, rewrite, shrink

CORPUS = [
    "the film was great and the actors were greater still",
    "a boring story about nothing, told by nobody in particular",
    "unbelievable! 1234 people watched it 56 times over again",
    "watching paint dry is more thrilling than this thriller",
    "naïve café owners dream of greatness; painters paint",
    "storytelling at its finest, the greatest tale ever told",
] * 4
TRAIN = ["the film was great", "a boring story", "watching the paint dry 12 times", "greatest tale ever told"]
UNSEEN = ["unbelievable storytelling", "nobody watched 5634 painters", "café owners in particular", "naïve actors"]
SPECIAL = {
    "BPE": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "WordPiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
}
KINDS = ("WordPiece", "BPE", "Unigram")


def _word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=180, special_tokens=SPECIAL["WordPiece"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    return t.BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


def _byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL["BPE"][:4],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return t.RobertaTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


def _unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=140, special_tokens=SPECIAL["BPE"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return t.XLMRobertaTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


MAKERS: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "WordPiece": (_word_piece, t.BertConfig, t.BertForSequenceClassification),
    "BPE": (_byte_level, t.RobertaConfig, t.RobertaForSequenceClassification),
    "Unigram": (_unigram, t.XLMRobertaConfig, t.XLMRobertaForSequenceClassification),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model with a trained tokenizer, by kind."""
    made = {}
    for kind, (tokenizer, config, model) in MAKERS.items():
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        hf = tokenizer()
        hf.save_pretrained(folder)
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        ids = {name: getattr(hf, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        # Three rows more than tokens, as in models whose table is padded.
        settings = {**shape, **{k: v for k, v in ids.items() if v is not None}, "max_position_embeddings": 40}
        made_model = model(config(vocab_size=len(hf) + 3, **settings))
        for parameter in made_model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        made_model.save_pretrained(folder)
    return made


def _context(folder: Path, work: Path, train: list[str] = TRAIN, validation: list[str] = UNSEEN) -> Context:
    task = get_task("text-classification")
    processor = task.load_processor(folder)
    return Context(
        teacher=load_student(folder, auto_class=task.auto_class),
        task=task,
        processor=processor,
        train=task.encode(processor, Examples({"text": train}), None),
        validation=task.encode(processor, Examples({"text": validation}, np.arange(len(validation)) % 2), None),
        test=None,
        target=Target(name="here", title="here", runtime="onnxruntime", device="cpu", precisions=("fp32",)),
        budget=Budget(),
        work=work,
        cache=work,
        progress=Silent(),
    )


def _tokens(folder: Path, texts: list[str]) -> list[list[str]]:
    hf = t.AutoTokenizer.from_pretrained(folder)
    return [hf.convert_ids_to_tokens(hf(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_training_texts_keep_their_tokens_and_their_logits_bit_by_bit(folders: Any, kind: str, tmp_path: Path) -> None:
    ctx = _context(folders[kind], tmp_path / "work")
    student = Vocabulary().run(ctx.teacher, ctx)
    student.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "work")
    assert _tokens(tmp_path / "saved", TRAIN) == _tokens(folders[kind], TRAIN)
    again = load_student(tmp_path / "saved", auto_class=ctx.task.auto_class)
    processor = ctx.task.load_processor(tmp_path / "saved")
    old, new = ctx.train.collate(np.arange(4)), ctx.train.again(processor).collate(np.arange(4))
    assert int(new["input_ids"].max()) < again.arch.vocabulary < ctx.teacher.arch.vocabulary - 3
    assert not torch.equal(old["input_ids"], new["input_ids"])
    with torch.no_grad():
        assert torch.equal(ctx.teacher.model(**old).logits, again.model(**new).logits)
    assert ctx.notes["train_changed"] == 0
    assert ctx.notes["rows_after"] == again.model.get_input_embeddings().num_embeddings == again.arch.vocabulary
    assert ctx.notes["bytes_saved"] == (ctx.notes["rows_before"] - ctx.notes["rows_after"]) * 16 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_same_tokens_and_special_ids_agree(folders: Any, kind: str, tmp_path: Path) -> None:
    ctx = _context(folders[kind], tmp_path)
    before = ctx.teacher.model.get_input_embeddings().weight.clone()
    student = Vocabulary().run(ctx.teacher, ctx)
    old, new = (t.AutoTokenizer.from_pretrained(f) for f in (folders[kind], student.processor_dir))
    table = student.model.get_input_embeddings()
    assert torch.equal(ctx.teacher.model.get_input_embeddings().weight, before)
    assert sorted(new.get_vocab().values()) == list(range(len(new)))
    for token, index in new.get_vocab().items():
        assert torch.equal(table.weight[index], before[old.get_vocab()[token]])
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(new, f"{name}_token") == getattr(old, f"{name}_token")
        assert new.convert_ids_to_tokens(getattr(new, f"{name}_token_id")) == getattr(old, f"{name}_token")
    assert student.model.config.pad_token_id == table.padding_idx == new.pad_token_id
    assert set(new.all_special_ids) <= set(range(len(new)))


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_are_spelt_out_and_never_unknown(folders: Any, kind: str, tmp_path: Path) -> None:
    ctx = _context(folders[kind], tmp_path)
    student = Vocabulary().run(ctx.teacher, ctx)
    old, new = _tokens(folders[kind], UNSEEN), _tokens(student.processor_dir, UNSEEN)
    unknown = ctx.processor.hf.unk_token
    assert [unknown in tokens for tokens in old] == [False] * 4 == [unknown in tokens for tokens in new]
    assert [len(a) < len(b) for a, b in zip(old, new, strict=True)].count(True) >= 2
    spelt = ["".join(tokens).replace("##", "") for tokens in (*old, *new)]
    assert spelt[:4] == spelt[4:]
    changed = np.mean([a != b for a, b in zip(old, new, strict=True)])
    facts = (ctx.notes["validation_changed"], ctx.notes["unknown_before"], ctx.notes["unknown_after"])
    assert facts == (pytest.approx(changed), 0, 0)


def test_padded_batches_give_the_logits_of_single_texts(folders: Any, tmp_path: Path) -> None:
    for kind in KINDS:
        ctx = _context(folders[kind], tmp_path / kind)
        student = Vocabulary().run(ctx.teacher, ctx)
        texts = ctx.train.again(ctx.task.load_processor(student.processor_dir))
        with torch.no_grad():
            together = student.model(**texts.collate(np.arange(4))).logits
            alone = torch.cat([student.model(**texts.collate(np.array([i]))).logits for i in range(4)])
        assert torch.allclose(together, alone, atol=1e-5)


def test_rare_tokens_go_if_asked_and_the_notes_tell(folders: Any, tmp_path: Path) -> None:
    rows = []
    for least in (1, 2):
        ctx = _context(folders["WordPiece"], tmp_path / str(least))
        Vocabulary(min_count=least).run(ctx.teacher, ctx)
        rows.append((ctx.notes["rows_after"], ctx.notes["train_changed"]))
    assert rows[0][0] > rows[1][0]
    assert rows[0][1] == 0 < rows[1][1]


def test_merges_are_closed_under_the_kept_tokens(folders: Any, tmp_path: Path) -> None:
    ctx = _context(folders["BPE"], tmp_path)
    student = Vocabulary().run(ctx.teacher, ctx)
    data = json.loads((student.processor_dir / "tokenizer.json").read_text())["model"]
    old = json.loads((folders["BPE"] / "tokenizer.json").read_text())["model"]
    made = {result for _, _, result in keep.merges_of(data)}
    assert all(part in data["vocab"] for merge in keep.merges_of(data) for part in merge)
    assert set(data["vocab"]) - made == set(old["vocab"]) - {result for _, _, result in keep.merges_of(old)}
    assert len(data["merges"]) < len(old["merges"])
    texts = (student.processor_dir / "merges.txt").read_text().splitlines()
    assert [line.split(" ") for line in texts if not line.startswith("#version")] == data["merges"]
    assert json.loads((student.processor_dir / "vocab.json").read_text()) == data["vocab"]


def test_a_kept_token_keeps_all_that_it_is_merged_from() -> None:
    merges = ["a b", "c d", "ab cd", "e f", "x ab"]
    names = ["a", "b", "c", "d", "e", "f", "x", "ab", "cd", "abcd", "ef", "xab"]
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": merges}
    assert keep.kept_tokens(model, ["abcd"]) == set("abcdefx") | {"ab", "cd", "abcd"}
    numbers = rewrite.renumber(model["vocab"], keep.kept_tokens(model, ["abcd"]))
    smaller = rewrite.reduced({"model": model}, numbers)["model"]
    assert smaller["merges"] == ["a b", "c d", "ab cd"]
    assert list(smaller["vocab"].values()) == list(range(10))


def test_all_ids_move_together(tmp_path: Path) -> None:
    tokens = ["gone", "[PAD]", "gone too", "[CLS]", "word", "[SEP]"]
    template = {"[CLS]": {"id": "[CLS]", "ids": [3], "tokens": ["[CLS]"]}}
    parts = [
        {"type": "TemplateProcessing", "single": [], "special_tokens": template},
        {"type": "BertProcessing", "sep": ["[SEP]", 5], "cls": ["[CLS]", 3]},
    ]
    tokenizer = {
        "model": {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(tokens)}},
        "added_tokens": [{"id": 1, "content": "[PAD]"}, {"id": 6, "content": "<new>"}],
        "padding": {"pad_id": 1, "pad_token": "[PAD]"},
        "post_processor": {"type": "Sequence", "processors": parts},
    }
    assert shrink._numbers_in(tokenizer["post_processor"]) == {3, 5}
    numbers = {1: 0, 3: 1, 4: 2, 5: 3, 6: 4}
    found = rewrite.reduced(tokenizer, numbers)
    assert found["model"]["vocab"] == {"[PAD]": 0, "[CLS]": 1, "word": 2, "[SEP]": 3}
    assert [token["id"] for token in found["added_tokens"]] == [0, 4]
    assert found["padding"]["pad_id"] == 0
    first, second = found["post_processor"]["processors"]
    assert first["special_tokens"]["[CLS]"]["ids"] == [1]
    assert (second["sep"], second["cls"]) == (["[SEP]", 3], ["[CLS]", 1])
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    files = {
        "vocab.txt": "\n".join(tokens),
        "added_tokens.json": json.dumps({"<new>": 6}),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"6": {"content": "<new>"}}, "pad_token_id": 1}),
        "sentencepiece.bpe.model": "",
    }
    for name, text in files.items():
        (old / name).write_text(text)
    rewrite.write_tokenizer(old, new, tokenizer, numbers)
    assert sorted(path.name for path in new.iterdir()) == ["added_tokens.json", "tokenizer_config.json", "vocab.txt"]
    assert (new / "vocab.txt").read_text().splitlines() == ["[PAD]", "[CLS]", "word", "[SEP]"]
    assert json.loads((new / "added_tokens.json").read_text()) == {"<new>": 4}
    settings = json.loads((new / "tokenizer_config.json").read_text())
    assert settings == {"added_tokens_decoder": {"4": {"content": "<new>"}}, "pad_token_id": 0}


def test_tokens_with_characters_that_nothing_else_has_stay() -> None:
    pieces = ["[UNK]", "a", "##b", "ab", "##ab", "q☃", "aba"]
    model = {"type": "WordPiece", "vocab": {piece: i for i, piece in enumerate(pieces)}}
    assert keep.kept_tokens(model, []) == {"[UNK]", "a", "##b", "##ab", "q☃", "aba"}
    scores = [["<unk>", 0.0], ["a", -1.0], ["aa", -2.0], ["a☃", -3.0], ["aaa", -9.0], ["<0x41>", 0.0], ["b", -4.0]]
    found = keep.kept_tokens({"type": "Unigram", "vocab": scores, "unk_id": 0}, [])
    assert found == {"<unk>", "a", "a☃", "aaa", "<0x41>", "b"}


def test_words_that_were_unknown_stay_so(tmp_path: Path, make_model: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_model("bert"), folder)
    words = (folder / "vocab.txt").read_text().split("\n")
    # "abcz" is unknown: "abc" is taken first, and nothing goes on with z. Without "abc" it would be "ab" and "##cz".
    words[5:11] = ["a", "##b", "ab", "abc", "##c", "##cz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    t.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    texts = ["abcz good", "ab word9", "bad ab"]
    assert _tokens(folder, texts)[0][1] == "[UNK]"
    ctx = _context(folder, tmp_path / "work", texts, texts)
    student = Vocabulary().run(ctx.teacher, ctx)
    assert _tokens(student.processor_dir, texts) == _tokens(folder, texts)
    assert ctx.notes["rows_after"] < len(words)


def test_new_unknown_words_are_an_error(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = _context(folders["WordPiece"], tmp_path)
    monkeypatch.setattr(shrink, "kept_tokens", lambda model, wanted: set(wanted))
    with pytest.raises(StageError, match="unknown tokens with the smaller tokenizer, not 0"):
        Vocabulary().run(ctx.teacher, ctx)


def test_texts_are_encoded_anew_in_their_own_order_and_length(folders: Any, tmp_path: Path) -> None:
    ctx = _context(folders["WordPiece"], tmp_path)
    student = Vocabulary().run(ctx.teacher, ctx)
    processor = ctx.task.load_processor(student.processor_dir)
    cut = ctx.task.encode(ctx.processor, Examples({"text": UNSEEN}, np.array([0, 1, 1, 0])), 6)
    some = cut.take(np.array([3, 0])).again(processor)
    direct = ctx.task.encode(processor, Examples({"text": [UNSEEN[3], UNSEEN[0]]}, np.array([0, 0])), 6)
    assert some.fingerprint == direct.fingerprint
    assert some.labels.tolist() == [0, 0]
    assert some.take(np.array([1])).again(ctx.processor).fingerprint == cut.take(np.array([0])).fingerprint
    with pytest.raises(DataError, match="without keeping their texts"):
        replace(cut, rows=None).again(processor)


def test_what_cannot_be_reduced_is_refused(folders: Any, tmp_path: Path, make_model: Any) -> None:
    ctx = _context(folders["Unigram"], tmp_path / "work")
    image = get_task("image-classification")
    with pytest.raises(RecipeError, match="for text, and the task is image-classification"):
        Vocabulary().run(load_student(make_model("vit"), auto_class=image.auto_class), replace(ctx, task=image))
    with pytest.raises(RecipeError, match="comes without one"):
        Vocabulary().run(replace(ctx.teacher, processor_dir=None), ctx)
    other = tmp_path / "other"
    other.mkdir()
    (other / "sentencepiece.bpe.model").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"needs tokenizer.json, and the model has sentencepiece.bpe.model; load it"):
        Vocabulary().run(replace(ctx.teacher, processor_dir=other), ctx)
    with pytest.raises(RecipeError, match="cannot reduce a WordLevel tokenizer"):
        keep.kept_tokens({"type": "WordLevel", "vocab": {}}, [])
    with pytest.raises(RecipeError, match="min_count must be at least 1, not 0"):
        Vocabulary(min_count=0)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is damaged"):
        Vocabulary().run(replace(ctx.teacher, processor_dir=other), ctx)


def test_a_tied_word_table_is_refused(folders: Any, tmp_path: Path) -> None:
    ctx = _context(folders["WordPiece"], tmp_path)
    student: Student = ctx.teacher
    student.model.extra = torch.nn.Linear(16, student.arch.vocabulary, bias=False)
    student.model.extra.weight = student.model.get_input_embeddings().weight
    with pytest.raises(ModelError, match=r"tied to other weights \(bert.embeddings.word_embeddings.weight, extra.wei"):
        Vocabulary().run(student, ctx)
