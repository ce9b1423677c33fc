import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.traces.documents import Document, in_split
from moesurgeon.traces.sampling import place_of, sampled
from moesurgeon.traces.spec import TraceSpec, parse_trace
from moesurgeon.traces.texts import key_of
from moesurgeon.traces.windows import Corpus, load_corpus


def _sizes(documents: list[Document]) -> list[int]:
    return [len(document.text) for document in documents]


def _documents(texts: list[str]) -> list[Document]:
    return [Document(key_of(text), text) for text in texts]


TEXTS = st.lists(st.text("ab", max_size=12), max_size=60)


@given(TEXTS, st.integers(1, 60), st.integers(0, 2**63 - 1), st.randoms())
def test_a_sample_is_the_least_beginning_of_the_order_of_hashes(
    texts: list[str], budget: int, seed: int, shuffler: random.Random
) -> None:
    documents = _documents(texts)
    chosen = sampled(documents, _sizes, budget=budget, seed=seed)
    shuffler.shuffle(documents)
    assert sampled(documents, _sizes, budget=budget, seed=seed) == chosen
    ordered = sorted((document for document in set(documents) if document.text), key=lambda d: place_of(d, seed))
    assert chosen == ordered[: len(chosen)]
    assert sum(_sizes(chosen)) >= min(budget, sum(_sizes(ordered)))
    assert sum(_sizes(chosen[:-1])) < budget
    assert sampled(documents, _sizes, budget=None, seed=seed) == ordered
    larger = sampled(documents, _sizes, budget=2 * budget, seed=seed)
    assert larger[: len(chosen)] == chosen


def test_every_document_is_as_likely() -> None:
    documents = _documents([f"{number:04d}" * 5 for number in range(200)])
    counts = np.zeros(200)
    for seed in range(400):
        for document in sampled(documents, _sizes, budget=20 * 20, seed=seed):
            counts[int(document.text[:4])] += 1
    # Binomial(400, 0.1): 40 with a standard deviation of 6.
    assert counts.sum() == 400 * 20
    assert counts.min() > 12 and counts.max() < 72
    assert abs(counts[:100].sum() - counts[100:].sum()) < 4 * (400 * 20) ** 0.5


def test_a_sample_has_nothing_to_do_with_the_split() -> None:
    documents = _documents([f"text {number}" for number in range(20_000)])
    report = [document for document in documents if in_split(document.key, "report")]
    assert 0.4 < sum(place_of(document, 7) < 1 << 127 for document in report) / len(report) < 0.6


def test_only_what_may_stay_is_tokenised() -> None:
    tokenised = 0

    def sizes(documents: list[Document]) -> list[int]:
        nonlocal tokenised
        tokenised += len(documents)
        return _sizes(documents)

    def many() -> Iterator[Document]:
        for number in range(50_000):
            yield Document(str(number), f"{number:010d}")

    assert len(sampled(many(), sizes, budget=1000, seed=1)) == 100
    assert tokenised < 1500  # 100 (1 + ln 500), and the batches that began before a place was lost


@pytest.mark.parametrize("length", [32, 512])
def test_a_corpus_is_the_same_from_any_order_and_format(length: int, tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [f"{number} " + "x" * rng.randrange(3, 90) for number in range(500)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    rng.shuffle(lines)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl.gz").write_bytes(gzip.compress("".join(lines[:200]).encode()))
    (tmp_path / "b" / "0.jsonl").write_text("".join(lines[200:]))

    def read(path: Path, sample: int | None, budget: int = 2000) -> Corpus:
        spec = TraceSpec(domain="d", location=str(path))
        return load_corpus(
            [spec], lambda texts: [list(text.encode()) for text in texts], splits=["all"], length=length,
            max_tokens=budget, sample=sample,
        )  # fmt: skip

    one, other = read(tmp_path / "a.jsonl", 3), read(tmp_path / "b", 3)
    assert one.hashes == other.hashes
    assert [window.tokens.tolist() for window in one.windows] == [window.tokens.tolist() for window in other.windows]
    assert 1992 < one.tokens["d"] <= 2000
    numbers = [int(bytes(window.tokens.tolist()).split()[0]) for window in one.windows if window.start == 0]
    assert max(numbers) > 400 and len(numbers) == len(set(numbers))
    assert read(tmp_path / "a.jsonl", 4).hashes != one.hashes
    assert read(tmp_path / "a.jsonl", None).hashes != one.hashes
    assert read(tmp_path / "a.jsonl", 3, 10**6).tokens == read(tmp_path / "a.jsonl", None, 10**6).tokens


def test_builtin_traces_are_sampled_as_well() -> None:
    spec = parse_trace("builtin:logs")
    corpora = [
        load_corpus([spec], lambda texts: [list(text.encode()) for text in texts], splits=["report"], length=64,
                    max_tokens=5000, sample=seed)
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert corpora[0].hashes == corpora[1].hashes != corpora[2].hashes
