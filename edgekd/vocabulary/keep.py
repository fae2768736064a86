"""Which tokens a smaller tokenizer must keep, from the `model` part of `tokenizer.json` as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from edgekd.errors import ModelError, RecipeError

Model = Mapping[str, Any]
Tokens = Mapping[str, int]


def kind_of(model: Model) -> str:
    """`WordPiece`, `BPE` or `Unigram`; old files do not state it.

    Raises:
        RecipeError: it is another kind, which has nothing smaller to fall back on.
    """
    stated = model.get("type")
    if stated is None:
        stated = "BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"
    if stated not in FALL_BACKS:
        raise RecipeError(
            f"the vocabulary stage cannot reduce a {stated} tokenizer; it knows {', '.join(FALL_BACKS)}: leave it out"
        )
    return str(stated)


def tokens_of(model: Model) -> dict[str, int]:
    """Token to id, of the model alone (added tokens may come on top)."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def kept_tokens(model: Model, wanted: Iterable[str]) -> set[str]:
    """The tokens wanted, what they are made of, and what any text can be spelt with.

    Args:
        model: the `model` part of `tokenizer.json`.
        wanted: tokens that must stay; those the model does not have are passed over.
    """
    own = tokens_of(model)
    return FALL_BACKS[kind_of(model)](model, own, {token for token in wanted if token in own})


def merges_of(model: Model) -> Iterator[tuple[str, str, str]]:
    """Left part, right part and result of each merge of a BPE model, in order.

    Raises:
        ModelError: a merge does not have two parts.
    """
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2:
            raise ModelError(f"tokenizer.json has a merge of {len(parts)} parts, {merge!r}; expected 2")
        yield parts[0], parts[1], parts[0] + parts[1].removeprefix(prefix)


def _word_piece(model: Model, own: Tokens, wanted: set[str]) -> set[str]:
    """Single characters, first and later in a word, and tokens with a character that is in no other way in reach."""
    prefix = model.get("continuing_subword_prefix") or "##"

    def reachable(token: str) -> bool:
        inner, first = token.removeprefix(prefix), not token.startswith(prefix)
        return all((character if first and i == 0 else prefix + character) in own for i, character in enumerate(inner))

    kept = {token for token in own if len(token.removeprefix(prefix)) <= 1 or not reachable(token)}
    return wanted | kept | ({model.get("unk_token", "[UNK]")} & own.keys())


def _byte_pair(model: Model, own: Tokens, wanted: set[str]) -> set[str]:
    """Symbols that no merge makes (all bytes, or all characters), and the parts of kept tokens, transitively."""
    made: dict[str, list[tuple[str, str]]] = {}
    for left, right, result in merges_of(model):
        made.setdefault(result, []).append((left, right))
    kept = {token for token in own if token not in made}
    waiting = list(wanted)
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += [part for pair in made.get(token, ()) for part in pair]
    return kept


def _unigram(model: Model, own: Tokens, wanted: set[str]) -> set[str]:
    """Single characters, bytes, pieces with a character of no piece of its own, and the least likely piece.

    The score of unknown characters is reckoned from the least likely piece.
    """
    scored = model["vocab"]
    kept = {piece for piece, _ in scored if len(piece) <= 1 or any(character not in own for character in piece)}
    kept |= {piece for piece, _ in scored if piece.startswith("<0x") and piece.endswith(">")}
    if model.get("unk_id") is not None:
        kept.add(scored[model["unk_id"]][0])
    return wanted | kept | {min(scored, key=lambda pair: pair[1])[0]}


FALL_BACKS: Mapping[str, Callable[[Model, Tokens, set[str]], set[str]]] = {
    "WordPiece": _word_piece,
    "BPE": _byte_pair,
    "Unigram": _unigram,
}
"""Kind of tokenizer to a function of (model, its tokens, those wanted) that gives those to keep."""
