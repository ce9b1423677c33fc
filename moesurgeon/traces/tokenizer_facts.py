"""Whether two checkpoints make the same tokens of a text, told from what their tokenizers say of themselves.

The tokenizers library writes a tokenizer out in one form, whatever the file looked like, so that two files which
differ in layout alone, or in how training data was cut and padded, are equal. What only turns tokens into text, or
says where in the text a token was, is left out. An older layout goes through transformers; one of those beside a
``tokenizer.json``, or one that is not written out at all, is compared by vocabulary, merges and the tokens of a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesurgeon.traces.tokenizer import JSON_NAME, load_tokenizer, read_older, read_tokenizer_json

_SAMPLE = (
    "def f(x):\n    return x ** 2  # 3.14, 1000000\n\n\tThe  naïve café's “quote” — isn't it?\r\n"
    '日本語のテキスト 한국어 العربية Ωμέγα ﬁ e\u0301 \u00a0 🙂👩‍👩‍👧 {"key": [1, 2.5e-3, null]}  \n'
)
_UNSAID = ("trim_offsets",)  # which characters a token covers
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class _Facts:
    """What decides which tokens a text becomes; ``said`` is None where the tokenizer is not written out.

    ``vocabulary``: the number of every token, added ones too. ``sample``: the tokens of a sample of text.
    """

    layout: str
    vocabulary: Mapping[str, int]
    sample: Sequence[int]
    said: Mapping[str, Any] | None


def tokenizers_differ(mine: Path, theirs: Path) -> str | None:
    """Return in a few words what differs between the tokenizers in two checkpoint folders; None if they are the same.

    Raises CheckpointError for a tokenizer that is missing or damaged.
    """
    if _same_files(mine, theirs):
        return None
    here, there = _facts(mine), _facts(theirs)
    if here.vocabulary != there.vocabulary:
        return _vocabulary(here.vocabulary, there.vocabulary)
    if here.said is not None and there.said is not None:
        difference = _merges(here.said["merges"], there.said["merges"])
        if difference is None and here.layout == there.layout:
            difference = _pieces(here.said, there.said)
        if difference is not None:
            return difference
    if here.sample != there.sample:
        return "the same text becomes other tokens, or gets other special tokens around it"
    return None


def _same_files(mine: Path, theirs: Path) -> bool:
    """Tell whether both folders have the same ``tokenizer.json`` and the same settings, byte for byte."""
    if not all((folder / JSON_NAME).is_file() for folder in (mine, theirs)):
        return False
    names = (JSON_NAME, "tokenizer_config.json")
    return all(_hash(mine / name) == _hash(theirs / name) for name in names)


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _facts(folder: Path) -> _Facts:
    sample = load_tokenizer(folder)([_SAMPLE])[0]
    if (folder / JSON_NAME).is_file():
        tokenizer = read_tokenizer_json(folder / JSON_NAME)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        return _Facts(JSON_NAME, vocabulary, sample, _said(tokenizer.to_str()))
    older = read_older(folder)
    backend: Any = getattr(older, "backend_tokenizer", None)
    said = None if backend is None else _said(backend.to_str())
    return _Facts("older", dict(older.get_vocab()), sample, said)


def _said(text: str) -> dict[str, Any]:
    """Return the pieces of a tokenizer that is written out; the vocabulary is not among them."""
    whole = json.loads(text)
    model = {name: value for name, value in whole["model"].items() if name not in ("vocab", "merges")}
    scores = [score for _, score in whole["model"]["vocab"]] if model["type"] == "Unigram" else None
    return {
        "merges": whole["model"].get("merges"),
        "added tokens": {token["content"]: [token[flag] for flag in _FLAGS] for token in whole["added_tokens"]},
        "scores": scores,
        "model": model,
        "normaliser": whole["normalizer"],
        "pre-tokeniser": _without_unsaid(whole["pre_tokenizer"]),
    }


def _without_unsaid(piece: Any) -> Any:
    if isinstance(piece, dict):
        return {name: _without_unsaid(value) for name, value in piece.items() if name not in _UNSAID}
    return [_without_unsaid(value) for value in piece] if isinstance(piece, list) else piece


def _vocabulary(mine: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    differing = [token for token, number in mine.items() if theirs.get(token) != number]
    differing += [token for token in theirs if token not in mine]
    first = min(differing, key=lambda token: (mine.get(token, theirs.get(token, 0)), token))
    numbers = ["missing" if number is None else f"token {number}" for number in (mine.get(first), theirs.get(first))]
    count = len(differing)
    many = f"{count:,} entries of the vocabulary differ" if count > 1 else "an entry of the vocabulary differs"
    return f"{many}: {_quoted(first)} is {numbers[0]} in the one and {numbers[1]} in the other"


def _merges(mine: Sequence[Any] | None, theirs: Sequence[Any] | None) -> str | None:
    if mine == theirs:
        return None
    pairs = zip(mine or [], theirs or [], strict=False)
    place = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return f"the one has {len(mine or []):,} merges, the other {len(theirs or []):,}"
    return f"the merges differ from number {place + 1:,} on"


def _pieces(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    for token in [*mine["added tokens"], *theirs["added tokens"]]:
        flags = [added["added tokens"].get(token) for added in (mine, theirs)]
        if flags[0] != flags[1]:
            how = "is an added token of one alone" if None in flags else "is found in text in another way"
            return f"the added tokens differ: {_quoted(token)} {how}"
    for name in ("normaliser", "pre-tokeniser"):
        if mine[name] != theirs[name]:
            return f"the {name}s differ"
    if mine["scores"] != theirs["scores"]:
        return "the scores of the vocabulary differ"
    for name in sorted(mine["model"].keys() | theirs["model"].keys()):
        if mine["model"].get(name) != theirs["model"].get(name):
            return f"the setting {name} of the tokenizer's model differs"
    return None


def _quoted(token: str) -> str:
    return repr(token if len(token) <= 40 else f"{token[:40]}...")
