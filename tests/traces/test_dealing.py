import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.errors import TraceError
from moesurgeon.traces import sources
from moesurgeon.traces.dealing import FEW, counts_of, deal
from moesurgeon.traces.documents import SHARES, Split, split_of
from moesurgeon.traces.sources import documents_in, read_documents
from moesurgeon.traces.spec import TraceSpec
from moesurgeon.traces.texts import key_of
from moesurgeon.traces.windows import load_corpus

SPLITS: tuple[Split, ...] = ("train", "calibration", "validation", "report")


def _keys(count: int, seed: int = 0) -> list[str]:
    return [key_of(f"{seed} text {number}") for number in range(count)]


def _words(texts: list[str], *, special: bool = True) -> list[list[int]]:
    return [list(range(len(text.split()))) for text in texts]


def _rows(path: Path, texts: list[str]) -> TraceSpec:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TraceSpec(domain="d", location=str(path))


def _by_split(spec: TraceSpec) -> dict[Split, set[str]]:
    return {split: {document.key for document in read_documents(spec, split)} for split in SPLITS}


@pytest.mark.parametrize("count", range(2, 301))
def test_no_split_that_healing_needs_is_empty(count: int) -> None:
    found = Counter(deal(_keys(count)).values())
    assert found == {split: number for split, number in counts_of(count).items() if number}
    assert sum(found.values()) == count
    assert found["train"] >= 1 and found["validation"] >= 1
    assert count < 3 or found["report"] >= 1
    assert count < 4 or found["calibration"] >= 1
    assert found["train"] == max(found.values())  # most of it heals
    for split, share in SHARES:
        assert count < 100 or abs(found[split] - count * share / 100) <= 4


@given(st.integers(2, 300), st.randoms(use_true_random=False))
def test_order_and_copies_change_no_split(count: int, rng: random.Random) -> None:
    keys = _keys(count, rng.randrange(1000))
    shuffled = [*keys, *rng.choices(keys, k=count // 2)]
    rng.shuffle(shuffled)
    assert deal(shuffled) == deal(keys)


def test_most_documents_keep_their_split_when_a_trace_grows() -> None:
    for count in (50, 200, FEW - 1):
        keys = _keys(count + count // 10)
        before, after = deal(keys[:count]), deal(keys)
        assert sum(before[key] != after[key] for key in before) <= 0.15 * count
    keys = _keys(FEW)
    few = deal(keys)  # from here on the hash decides
    assert sum(few[key] != split_of(key) for key in keys) <= 0.15 * FEW


def test_a_trace_is_few_documents_by_its_different_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FEW", 30)
    texts = [f"text {number}" for number in range(29)]
    spec = _rows(tmp_path / "few.jsonl", [*texts, *texts])
    assert documents_in(spec) == 29
    assert _by_split(spec)["validation"] == {
        key for key, split in deal(map(key_of, texts)).items() if split == "validation"
    }
    many = _rows(tmp_path / "many.jsonl", [*texts, "one more"])
    assert documents_in(many) is None
    for split, keys in _by_split(many).items():
        assert all(split_of(key) == split for key in keys)


def test_a_large_trace_is_not_read_to_its_end_for_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FEW", 30)
    path = tmp_path / "large.jsonl"
    texts = [f"text {number}" for number in range(500)]
    _rows(path, texts)
    path.write_text(path.read_text() + "damaged\n")
    first = next(read_documents(TraceSpec(domain="d", location=str(path)), "train"))
    assert split_of(first.key) == "train"


def test_the_same_texts_are_in_the_same_splits_in_any_file(tmp_path: Path) -> None:
    texts = [f"{number} " + "word " * 50 + "end" for number in range(23)]
    wanted = _by_split(_rows(tmp_path / "a.jsonl", texts))
    assert all(wanted.values())
    assert _by_split(_rows(tmp_path / "b.jsonl", [*reversed(texts), *texts[3:9]])) == wanted
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    assert _by_split(TraceSpec(domain="d", location=str(tmp_path / "c.parquet"))) == wanted
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    _rows(folder / "z.jsonl", texts[:11])
    _rows(folder / "sub" / "y.jsonl", texts[9:])
    assert _by_split(TraceSpec(domain="d", location=str(folder))) == wanted
    files = tmp_path / "files"
    files.mkdir()
    for number, text in enumerate(texts):  # a text file each, with other line ends around it
        (files / f"{number * 7 % 23}.txt").write_text(f"{text}\n" if number % 2 else f"\n\n{text}")
    assert _by_split(TraceSpec(domain="d", location=str(files))) == wanted


def test_passages_of_a_file_stay_together(tmp_path: Path) -> None:
    rng = random.Random(1)
    folder = tmp_path / "books"
    folder.mkdir()
    wanted: dict[str, str] = {}
    for number in range(6):
        paragraphs = [f"book {number} " + "word " * rng.randint(100, 400) for _ in range(40)]
        (folder / f"{number}.md").write_text("\n\n".join(paragraphs))
        wanted |= {line: f"book {number}" for line in paragraphs}
    (folder / "more.txt.gz").write_bytes(gzip.compress("\r\n\r\n".join(["book 6 " + "word " * 300] * 20).encode()))
    spec = TraceSpec(domain="d", location=str(folder))
    books: dict[str, set[Split]] = {}
    keys: dict[str, set[str]] = {}
    for split in SPLITS:
        for document in read_documents(spec, split):
            books.setdefault(document.text[:6], set()).add(split)
            keys.setdefault(document.text[:6], set()).add(document.key)
    assert len(books) == 7
    assert all(len(splits) == 1 for splits in books.values())
    assert all(len(found) == 1 for found in keys.values())  # one document where intervals are clustered
    assert sum(1 for _ in read_documents(spec, "all")) > 7


def test_a_book_is_one_document_as_a_file_and_as_a_row(tmp_path: Path) -> None:
    book = "\n\n".join(f"paragraph {number} " + "word " * 300 for number in range(20))
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_bytes(("\ufeff" + book.replace("\n", "\r\n") + "\r\n").encode())
    (folder / "b.txt").write_text("another")
    keys = {document.key for document in read_documents(TraceSpec(domain="d", location=str(folder)), "all")}
    assert keys == {key_of(book), key_of("another")}


def test_a_lone_text_file_is_a_collection(tmp_path: Path) -> None:
    path = tmp_path / "lone.txt"
    path.write_text("\n\n".join(f"paragraph {number} " + "word " * 900 for number in range(30)))
    found = _by_split(TraceSpec(domain="d", location=str(path)))
    assert {split: len(keys) for split, keys in found.items()} == counts_of(30)


@pytest.mark.parametrize("count", [2, 3, 4, 20, 62, 161])
def test_a_trace_gives_windows_to_each_of_its_splits(count: int, tmp_path: Path) -> None:
    texts = [f"{number} " + "word " * 20 for number in range(count)]
    # What is too short for a window is not dealt out, so that it is not all that a split gets.
    spec = _rows(tmp_path / "t.jsonl", [line for text in texts for line in (f"short {text[:4]}", text)])
    seen: set[str] = set()
    for split, number in counts_of(count).items():
        if number:
            corpus = load_corpus([spec], _words, splits=[split], length=16, max_tokens=None)
            assert len(corpus.documents["d"]) == number
            assert not seen & set(corpus.documents["d"])
            seen |= set(corpus.documents["d"])
        else:
            with pytest.raises(TraceError, match=f"t.jsonl has {count} documents, and none is left for its {split}"):
                load_corpus([spec], _words, splits=[split], length=16, max_tokens=None)
    assert seen == {key_of(text) for text in texts}


def test_one_document_makes_one_split(tmp_path: Path) -> None:
    spec = _rows(tmp_path / "one.jsonl", ["one text " * 10] * 5)
    assert load_corpus([spec], _words, splits=["train"], length=16, max_tokens=None).tokens == {"d": 80}
    with pytest.raises(TraceError, match="has one document, and none is left for its validation split"):
        load_corpus([spec], _words, splits=["validation"], length=16, max_tokens=None)
