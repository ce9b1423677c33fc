"""Two tokenizers are the same if they make the same tokens, whatever their files look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from moesurgeon.errors import CheckpointError
from moesurgeon.traces.tokenizer_facts import tokenizers_differ

WORDS = ["<unk>", "a", "b", "c", "d", "ab", "cd", "abcd", "<s>"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]


def tokenizer(
    vocabulary: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None, **model: Any
) -> Any:
    vocabulary = vocabulary or {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.BPE(vocabulary, MERGES if merges is None else merges, **{"unk_token": "<unk>"} | model))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 8)])
    made.add_special_tokens(["<s>"])
    return made


def folder(path: Path, made: Any = None, **config: Any) -> Path:
    path.mkdir()
    (made or tokenizer()).save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def changed(change: Callable[[Any], None]) -> Any:
    made = tokenizer()
    change(made)
    return made


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return folder(tmp_path / "mine")


def test_layout_and_what_does_not_make_tokens_do_not_count(mine: Path, tmp_path: Path) -> None:
    made = tokenizer()
    made.enable_truncation(4)
    made.enable_padding(length=64)
    theirs = folder(tmp_path / "theirs", made, model_max_length=512, chat_template="{{ messages }}")
    assert tokenizers_differ(mine, theirs) is None
    said = json.loads((theirs / "tokenizer.json").read_text())
    said["model"]["merges"] = [" ".join(pair) for pair in said["model"]["merges"]]  # as older versions wrote them
    said["model"]["vocab"] = dict(reversed(said["model"]["vocab"].items()))
    said["decoder"] = {"type": "Fuse"}
    said["added_tokens"][0]["special"] = False
    (theirs / "tokenizer.json").write_text(json.dumps(said, indent=8))
    assert tokenizers_differ(mine, theirs) is None
    assert tokenizers_differ(mine, mine) is None


ADDED = "the added tokens differ"
SWAPPED = {word: number for number, word in enumerate(WORDS)} | {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (tokenizer(SWAPPED), "2 entries of the vocabulary differ: 'a' is token 1 in the one and token 2 in the other"),
        (
            tokenizer({word: number for number, word in enumerate([*WORDS, "x"])}),
            "an entry of the vocabulary differs: 'x' is missing in the one and token 9 in the other",
        ),
        (tokenizer(merges=[("c", "d"), ("a", "b"), ("ab", "cd")]), "the merges differ from number 1 on"),
        (tokenizer(merges=MERGES[:2]), "the one has 3 merges, the other 2"),
        (changed(lambda made: made.add_tokens(["abcd"])), f"{ADDED}: 'abcd' is an added token of one alone"),
        (
            changed(lambda made: made.add_special_tokens([AddedToken("<s>", lstrip=True)])),
            "the added tokens differ: '<s>' is found in text in another way",
        ),
        (changed(lambda made: setattr(made, "normalizer", normalizers.NFKC())), "the normalisers differ"),
        (
            changed(lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.WhitespaceSplit())),
            "the pre-tokenisers differ",
        ),
        (tokenizer(fuse_unk=True), "the setting fuse_unk of the tokenizer's model differs"),
        (
            changed(lambda made: setattr(made, "post_processor", processors.ByteLevel())),
            "the same text becomes other tokens, or gets other special tokens around it",
        ),
    ],
)  # fmt: skip
def test_what_makes_other_tokens_is_named(mine: Path, tmp_path: Path, made: Any, says: str) -> None:
    theirs = folder(tmp_path / "theirs", made)
    assert tokenizers_differ(mine, theirs) == says
    assert tokenizers_differ(theirs, mine) is not None


def test_the_settings_may_add_a_token(tmp_path: Path) -> None:
    """DeepSeek-MoE says only there that a text begins with one."""
    bare = changed(lambda made: setattr(made, "post_processor", processors.ByteLevel()))
    sides = [
        folder(tmp_path / str(number), bare, bos_token="<s>", add_bos_token=begins)
        for number, begins in enumerate([True, False])
    ]
    assert tokenizers_differ(*sides) == "the same text becomes other tokens, or gets other special tokens around it"
    assert tokenizers_differ(sides[0], folder(tmp_path / "written")) is None  # the same by another way


def test_scores_of_pieces(tmp_path: Path) -> None:
    pieces = [[("<unk>", 0.0), ("a", -1.0), ("aa", score)] for score in (-1.5, -3.0)]
    sides = [folder(tmp_path / str(number), Tokenizer(models.Unigram(each, 0))) for number, each in enumerate(pieces)]
    assert tokenizers_differ(*sides) == "the scores of the vocabulary differ"


def older(path: Path, words: list[str], **config: Any) -> Path:
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *words]) + "\n")
    (path / "config.json").write_text('{"model_type": "bert"}')
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    return path


def test_older_layouts(tmp_path: Path) -> None:
    mine, same = older(tmp_path / "mine", ["router", "expert"]), older(tmp_path / "same", ["router", "expert"])
    assert tokenizers_differ(mine, same) is None
    difference = tokenizers_differ(mine, older(tmp_path / "theirs", ["expert", "router"]))
    assert difference is not None and difference.startswith("2 entries of the vocabulary differ: 'router' is token 5")
    assert tokenizers_differ(mine, older(tmp_path / "cased", ["router", "expert"], do_lower_case=False)) is not None
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(mine).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert tokenizers_differ(mine, tmp_path / "new") is None


def test_damage_is_an_error_of_one_line(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged"):
        tokenizers_differ(mine, tmp_path / "theirs")
