import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.errors import TraceError, UsageError
from moesurgeon.traces.documents import Document
from moesurgeon.traces.spec import TraceSpec, parse_traces
from moesurgeon.traces.texts import key_of
from moesurgeon.traces.windows import SHORTEST, Catalogue, Window, load_corpus, take_windows


def _bytes(texts: list[str]) -> list[list[int]]:
    """Stand in for a tokenizer: one token per byte."""
    return [list(text.encode()) for text in texts]


def _documents(lengths: list[int]) -> list[Document]:
    return [Document(str(i), "".join(chr(33 + (i + j) % 90) for j in range(n))) for i, n in enumerate(lengths)]


LENGTHS = st.lists(st.integers(0, 100), max_size=40)


@given(LENGTHS, st.integers(SHORTEST, 40))
def test_windows_are_the_documents_tokens_cut(lengths: list[int], length: int) -> None:
    documents = _documents(lengths)
    catalogue = Catalogue()
    windows = take_windows(documents, "d", _bytes, length=length, max_tokens=None, catalogue=catalogue)
    numbers = catalogue.keys
    assert list(numbers.values()) == list(range(len(numbers)))
    assert all(SHORTEST <= len(window.tokens) <= length for window in windows)
    assert all(window.tokens.dtype == np.int32 for window in windows)
    for document in documents:
        own = [window for window in windows if window.document == numbers.get(document.key)]
        tokens = [token for window in own for token in window.tokens.tolist()]
        whole = list(document.text.encode())
        assert tokens == whole[: len(tokens)]
        assert len(whole) - len(tokens) < SHORTEST
        assert [window.start for window in own] == list(range(0, len(tokens), length))


@given(LENGTHS, st.integers(SHORTEST, 40), st.integers(0, 2000))
def test_a_budget_is_met_exactly(lengths: list[int], length: int, budget: int) -> None:
    documents = _documents(lengths)
    everything = take_windows(documents, "d", _bytes, length=length, max_tokens=None)
    windows = take_windows(documents, "d", _bytes, length=length, max_tokens=budget)
    total, available = _tokens(windows), _tokens(everything)
    assert total <= budget
    if available >= budget:
        assert budget - total < SHORTEST
    # A budget shortens the trace and changes nothing else in it.
    for short, full in zip(windows, everything, strict=False):
        assert (short.document, short.start) == (full.document, full.start)
        assert short.tokens.tolist() == full.tokens[: len(short.tokens)].tolist()
    assert all(len(s.tokens) == len(f.tokens) for s, f in zip(windows[:-1], everything, strict=False))


def _tokens(windows: list[Window]) -> int:
    return sum(len(window.tokens) for window in windows)


def test_an_endless_trace_is_read_no_further_than_its_budget() -> None:
    seen = 0

    def endless() -> Iterator[Document]:
        nonlocal seen
        while True:
            seen += 1
            yield Document(str(seen), "x" * 100)

    assert _tokens(take_windows(endless(), "d", _bytes, length=64, max_tokens=1000)) == 1000
    assert seen <= 16 + 1000 // 92


def test_a_corpus_divides_its_budget_evenly() -> None:
    specs = parse_traces(["builtin:arithmetic", "sums=builtin:arithmetic", "builtin:json"])
    corpus = load_corpus(specs, _bytes, splits=["report"] * len(specs), length=512, max_tokens=10_001)
    assert corpus.domains == ("arithmetic", "sums", "json")
    assert corpus.tokens == {"arithmetic": 3334, "sums": 3334, "json": 3333}
    assert corpus.hashes["arithmetic"] == corpus.hashes["sums"] != corpus.hashes["json"]
    for domain in corpus.domains:
        assert _tokens([w for w in corpus.windows if w.domain == domain]) == corpus.tokens[domain]
    again = load_corpus(specs, _bytes, splits=["report"] * len(specs), length=512, max_tokens=10_001)
    assert again.hashes == corpus.hashes
    assert [w.tokens.tolist() for w in again.windows] == [w.tokens.tolist() for w in corpus.windows]


def test_a_corpus_names_the_documents_of_its_windows(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    texts = ["one text of some length", "short", "another text of some length", "one text of some length"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = load_corpus(parse_traces([str(path)]), _bytes, splits=["all"], length=16, max_tokens=None)
    assert corpus.documents["few"] == (key_of(texts[0]), key_of(texts[2]))
    for window in corpus.windows:
        text = {key_of(text): text for text in texts}[corpus.documents["few"][window.document]]
        assert bytes(window.tokens.tolist()).decode() in text


def test_a_budget_or_length_too_small_to_use_is_wrong_usage() -> None:
    specs = parse_traces(["builtin:json", "builtin:logs"])
    with pytest.raises(UsageError, match="--max-tokens to at least 16"):
        load_corpus(specs, _bytes, splits=["report"] * len(specs), length=64, max_tokens=15)
    with pytest.raises(UsageError, match="at least 8"):
        load_corpus(specs, _bytes, splits=["report"] * len(specs), length=7, max_tokens=None)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "tiny.jsonl holds no text of at least 8 tokens"),
        (["  "], "tiny.jsonl holds no text of at least 8 tokens"),
        (["a text that lands in one split only"], "has one document, and none is left for its .* split: give more"),
    ],
)
def test_a_trace_without_windows_says_why(texts: list[str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = TraceSpec(domain="tiny", location=str(path))
    empty = 0
    for split in ("calibration", "validation", "report"):
        try:
            load_corpus([spec], _bytes, splits=[split], length=64, max_tokens=None)
        except TraceError as error:
            empty += 1
            with pytest.raises(TraceError, match=says):
                raise
            assert "\n" not in str(error)
    assert empty >= 2


def test_texts_that_are_all_too_short(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("short")
    with pytest.raises(TraceError, match="at least 8 tokens"):
        load_corpus(parse_traces([str(tmp_path / "tiny.txt")]), _bytes, splits=["all"], length=64, max_tokens=None)
