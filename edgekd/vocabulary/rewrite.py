"""Write the files of a tokenizer again with fewer tokens, numbered densely in their old order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import ModelError, RecipeError
from edgekd.files import explained
from edgekd.student import PROCESSOR_FILES
from edgekd.vocabulary.keep import kind_of, merges_of, tokens_of

Numbers = Mapping[int, int]
"""Old id to new id, of the tokens that stay."""


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """`tokenizer.json` of a model folder, as plain data.

    Raises:
        RecipeError: the folder has no such file, but perhaps one of another library.
        ModelError: it is damaged.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        others = [name for name in PROCESSOR_FILES if name.endswith((".model", ".txt")) and (folder / name).is_file()]
        raise RecipeError(
            f"the vocabulary stage needs tokenizer.json, and the model has {', '.join(others) or 'no tokenizer'}; load "
            "it with AutoTokenizer, save it with save_pretrained, which writes that file, or leave the stage out"
        )
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        tokens_of(data["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    return data


def all_tokens(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token to id, added tokens included."""
    return {**tokens_of(tokenizer["model"]), **{t["content"]: t["id"] for t in tokenizer.get("added_tokens") or ()}}


def renumber(tokens: Mapping[str, int], kept: Collection[str]) -> dict[int, int]:
    """Dense new ids of the kept tokens, in the order of the old ones."""
    return {old: new for new, old in enumerate(sorted({tokens[token] for token in kept}))}


def write_tokenizer(source: Path, folder: Path, tokenizer: Mapping[str, Any], numbers: Numbers) -> None:
    """Write all files of the tokenizer in `source` to `folder`, reduced to the tokens in `numbers`."""
    with explained("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in PROCESSOR_FILES:
            if (source / name).is_file() and not name.endswith(".model"):
                REWRITERS.get(name, _copy)(source / name, folder / name, tokenizer, numbers)


def reduced(tokenizer: Mapping[str, Any], numbers: Numbers) -> dict[str, Any]:
    """The contents of `tokenizer.json` with only these tokens."""
    data = json.loads(json.dumps(tokenizer))
    data["model"] = _model(data["model"], numbers)
    data["added_tokens"] = [{**token, "id": numbers[token["id"]]} for token in data.get("added_tokens") or ()]
    data["post_processor"] = _post_processor(data.get("post_processor"), numbers)
    if data.get("padding"):
        data["padding"]["pad_id"] = numbers[data["padding"]["pad_id"]]
    return dict(data)


def _model(model: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
    if kind_of(model) == "Unigram":
        unknown = model.get("unk_id")
        pieces = [pair for index, pair in enumerate(model["vocab"]) if index in numbers]
        return {**model, "vocab": pieces, "unk_id": None if unknown is None else numbers[unknown]}
    model = {**model, "vocab": _vocabulary(model["vocab"], numbers)}
    if "merges" in model:
        model["merges"] = [merge for merge, _ in _merges(model)]
    return model


def _vocabulary(vocabulary: Mapping[str, int], numbers: Numbers) -> dict[str, int]:
    pairs = sorted((numbers[old], token) for token, old in vocabulary.items() if old in numbers)
    return {token: new for new, token in pairs}


def _merges(model: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """The merges whose parts and result are in the vocabulary: as they stand, and as a line of `merges.txt`."""
    own = model["vocab"]
    triples = zip(model["merges"], merges_of(model), strict=True)
    return [(merge, f"{part[0]} {part[1]}") for merge, part in triples if all(token in own for token in part)]


def _post_processor(processor: Any, numbers: Numbers) -> Any:
    """Ids of special tokens in `TemplateProcessing`, `BertProcessing`, `RobertaProcessing` and sequences of them."""
    if not isinstance(processor, dict):
        return processor
    found = dict(processor)
    for key in ("processors", "pretokenizers"):
        if key in found:
            found[key] = [_post_processor(part, numbers) for part in found[key]]
    for key in ("sep", "cls"):
        if isinstance(found.get(key), list):
            found[key] = [found[key][0], numbers[found[key][1]]]
    if isinstance(found.get("special_tokens"), dict):
        found["special_tokens"] = {
            name: {**entry, "ids": [numbers[old] for old in entry["ids"]]}
            for name, entry in found["special_tokens"].items()
        }
    return found


def remapped(settings: Mapping[str, Any], numbers: Numbers) -> dict[str, Any]:
    """Settings with new values under every key such as `pad_token_id`; ids that are gone stay out of it."""
    return {
        key: numbers[value] if key.endswith("_token_id") and type(value) is int and value in numbers else value
        for key, value in settings.items()
    }


def _copy(source: Path, file: Path, tokenizer: Mapping[str, Any], numbers: Numbers) -> None:
    shutil.copyfile(source, file)


def _tokenizer_json(source: Path, file: Path, tokenizer: Mapping[str, Any], numbers: Numbers) -> None:
    _dump(file, reduced(tokenizer, numbers))


def _tokenizer_config(source: Path, file: Path, tokenizer: Mapping[str, Any], numbers: Numbers) -> None:
    settings = remapped(json.loads(source.read_text(encoding="utf-8")), numbers)
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {str(numbers[int(old)]): token for old, token in decoder}
    _dump(file, settings)


def _token_ids(source: Path, file: Path, tokenizer: Mapping[str, Any], numbers: Numbers) -> None:
    _dump(file, _vocabulary(json.loads(source.read_text(encoding="utf-8")), numbers))


def _lines(source: Path, file: Path, tokenizer: Mapping[str, Any], numbers: Numbers) -> None:
    names = {new: token for token, new in _vocabulary(all_tokens(tokenizer), numbers).items()}
    count = len(_vocabulary(tokens_of(tokenizer["model"]), numbers))
    file.write_text("".join(f"{names[new]}\n" for new in range(count)), encoding="utf-8")


def _merge_lines(source: Path, file: Path, tokenizer: Mapping[str, Any], numbers: Numbers) -> None:
    head = source.read_text(encoding="utf-8").partition("\n")[0]
    lines = [line for _, line in _merges(_model(dict(tokenizer["model"]), numbers))]
    start = [head] if head.startswith("#version") else []
    file.write_text("".join(f"{line}\n" for line in [*start, *lines]), encoding="utf-8")


def _dump(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


REWRITERS = {
    "tokenizer.json": _tokenizer_json,
    "tokenizer_config.json": _tokenizer_config,
    "added_tokens.json": _token_ids,
    "vocab.json": _token_ids,
    "vocab.txt": _lines,
    "merges.txt": _merge_lines,
}
"""File to a function of (old file, new file, contents of `tokenizer.json`, numbers) that writes it."""
