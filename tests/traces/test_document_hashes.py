"""Documents are known again by short hashes, whatever else was read, and a record of them is small and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesurgeon.errors import TraceError
from moesurgeon.traces.document_hashes import LETTERS, MOST, documents_of, hashes_of, packed, unpacked, windows_in
from moesurgeon.traces.documents import Document
from moesurgeon.traces.left_out import Excluded
from moesurgeon.traces.spec import parse_traces
from moesurgeon.traces.texts import key_of
from moesurgeon.traces.windows import Corpus, load_corpus

TEXTS = [f"text {number} " * 12 for number in range(12)]


def words(texts: list[str], /, *, special: bool = True) -> list[list[int]]:
    return [list(range(len(text.split()))) for text in texts]


def written(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(path: Path | str, excluded: set[str] | frozenset[str] = frozenset(), **options: int | None) -> Corpus:
    given = Excluded(frozenset(excluded), "healed CKPT", "give other text") if excluded else None
    settings = {"length": 8, "max_tokens": None, **options}
    return load_corpus(parse_traces([str(path)]), words, splits=["all"], excluded=given, **settings)  # type: ignore[arg-type]


def test_a_record_is_small_and_comes_back(tmp_path: Path) -> None:
    hashes = documents_of(read(written(tmp_path / "a.jsonl", TEXTS)))
    assert len(hashes) == len(TEXTS) and len(packed(hashes)) == LETTERS * len(TEXTS)
    assert unpacked(packed(hashes)) == hashes and packed(reversed(sorted(hashes))) == packed(hashes)
    assert unpacked("") == frozenset()
    many = {f"{number:08d}".translate(str.maketrans("0123456789", "abcdefghij")) for number in range(MOST + 3)}
    assert len(packed(many)) == LETTERS * MOST
    for text in ("aaaaaaa", "aaaaaaa1", "AAAAAAAA", 5, None, "a" * LETTERS * (MOST + 1)):
        with pytest.raises(ValueError, match="list"):
            unpacked(text)


def test_documents_are_known_again_in_another_file_and_order(tmp_path: Path) -> None:
    whole, part = read(written(tmp_path / "a.jsonl", TEXTS)), read(written(tmp_path / "b.jsonl", TEXTS[7:4:-1]))
    assert documents_of(part) < documents_of(whole)
    assert windows_in(whole, documents_of(part)) == (3, sum(len(text.split()) for text in TEXTS[5:8]))
    assert windows_in(part, documents_of(whole)) == (3, sum(part.tokens.values()))
    assert hashes_of(Document(key_of(TEXTS[6]), TEXTS[6])) < documents_of(part)


def test_a_file_is_known_as_a_whole_and_by_its_passages(tmp_path: Path) -> None:
    """Read among others it is one document; alone every passage is."""
    passages = "\n\n".join(TEXTS[:3])
    (tmp_path / "one.txt").write_text(passages)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.txt").write_text(passages)
    (tmp_path / "folder" / "two.txt").write_text("\n\n".join(TEXTS[3:]))
    alone, among = read(tmp_path / "one.txt"), read(tmp_path / "folder")
    assert documents_of(alone) & documents_of(among)
    assert windows_in(among, documents_of(alone))[0] == 1
    left = read(tmp_path / "folder", documents_of(alone))
    assert documents_of(alone).isdisjoint(documents_of(left))


def test_builtin_documents_are_known_by_name_and_text() -> None:
    """Code and docstrings of a module have one name."""
    code, text = Document("json/decoder.py", "def decode"), Document("json/decoder.py", "Decode JSON.")
    assert hashes_of(code).isdisjoint(hashes_of(text)) and len(hashes_of(code)) == 1
    assert hashes_of(code).isdisjoint(hashes_of(Document("json/encoder.py", "def decode")))


def test_others_are_read_in_their_place(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", TEXTS)
    first = read(path, max_tokens=48)
    assert sum(first.tokens.values()) == 48
    others = read(path, documents_of(first), max_tokens=48)
    assert sum(others.tokens.values()) == 48 and documents_of(first).isdisjoint(documents_of(others))
    (left_out,) = others.left_out.values()
    assert (len(left_out.keys), left_out.tokens) == (2, 48)
    sampled = read(path, documents_of(first), max_tokens=48, sample=3)
    assert documents_of(first).isdisjoint(documents_of(sampled))
    rest = read(path, documents_of(first), max_tokens=10_000)
    assert sum(rest.tokens.values()) == sum(len(text.split()) for text in TEXTS) - 48
    assert not read(path).left_out["a"].keys
    with pytest.raises(
        TraceError, match=r"all 12 documents healed CKPT, and none is left to measure on: give other text"
    ):
        read(path, documents_of(read(path)))


def test_a_sample_of_a_corpus_has_its_documents_alone(tmp_path: Path) -> None:
    from dataclasses import replace

    whole = read(written(tmp_path / "a.jsonl", TEXTS))
    some = replace(whole, windows=[window for window in whole.windows if window.document < 2])
    assert len(documents_of(some)) == 2
