"""Losses and distances against plain formulas on the full logits, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.engine.batches import rows_for
from moesurgeon.engine.scratch import Scratch
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import UsageError
from moesurgeon.evaluation import measure as measuring
from moesurgeon.evaluation.measure import AGREEMENT, ESAP, KL, LOSS, TEACHER_LOSS, Measurement, measure
from moesurgeon.pipeline.subject import Subject
from moesurgeon.traces.windows import Corpus, Window
from tests.engine.small import (
    VOCABULARY,
    batches_for,
    corpus_of,
    random_windows,
    running,
    saved,
    small_model,
    source_of,
    stream_of,
)

LENGTH = 40


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Subject]:
    """A model and its teacher: of different families, with one vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    return (
        saved(small_model("mixtral"), folder / "model"),
        saved(small_model("deepseek_v1", seed=1), folder / "teacher"),
    )


@pytest.fixture(scope="module")
def streams(subjects: tuple[Subject, Subject]) -> tuple[Stream, Stream]:
    return stream_of(subjects[0]), stream_of(subjects[1])


def _measure(stream: Stream, corpus: Corpus, teacher: Stream | None = None, rows: int | None = None) -> Measurement:
    return measure(stream, corpus.domains, batches_for(corpus, LENGTH, rows), teacher=teacher)


@pytest.fixture(scope="module", autouse=True)
def _small_buckets() -> Iterator[None]:
    """Four buckets in windows of 40 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "EDGES", (0, 8, 16, 32, 64))
        yield


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return corpus_of(
        random_windows("one", count=7, vocabulary=VOCABULARY, longest=LENGTH),
        random_windows("two", count=4, vocabulary=VOCABULARY, longest=LENGTH),
    )


@pytest.fixture(scope="module")
def measured(streams: tuple[Stream, Stream], corpus: Corpus) -> Measurement:
    return _measure(streams[0], corpus, streams[1])


def _plain(model: PreTrainedModel, teacher: PreTrainedModel, window: Window) -> np.ndarray:
    """Return the columns [T - 1, 5] of one window by itself, token by token."""
    tokens = torch.from_numpy(window.tokens.astype(np.int64))
    with torch.no_grad():
        logits, wanted = (one(input_ids=tokens[None]).logits[0].double().numpy() for one in (model, teacher))
    columns = np.zeros((len(tokens) - 1, 5))
    for place, row in enumerate(columns):
        target = int(tokens[place + 1])
        p, q = (np.exp(values[place]) / np.exp(values[place]).sum() for values in (logits, wanted))
        row[LOSS], row[TEACHER_LOSS] = -np.log(p[target]), -np.log(q[target])
        row[KL] = sum(q[v] * np.log(q[v] / p[v]) for v in range(VOCABULARY))
        row[AGREEMENT] = float(np.argmax(p) == np.argmax(q))
        row[ESAP] = sum(min(p[v], q[v]) for v in range(VOCABULARY))
    return columns


def _by_window(corpus: Corpus) -> Iterator[Window]:
    """The windows in the order in which batches bring them."""
    for domain in corpus.domains:
        yield from sorted((w for w in corpus.windows if w.domain == domain), key=lambda w: -len(w.tokens))


def test_every_sum_is_that_of_the_plain_formulas(
    subjects: tuple[Subject, Subject], corpus: Corpus, measured: Measurement
) -> None:
    model, teacher = (running(subject) for subject in subjects)
    for number, window in enumerate(_by_window(corpus)):
        columns = _plain(model, teacher, window)
        np.testing.assert_allclose(measured.sums[number], columns.sum(axis=0), rtol=1e-5, atol=1e-5)
        assert measured.domains[measured.domain[number]] == window.domain
        assert measured.document[number] == window.document
        assert measured.positions[number] == len(window.tokens) - 1
        for bucket, (low, high) in enumerate(itertools.pairwise((0, 8, 16, 32, 64))):
            part = columns[low:high]
            wanted = [*part.sum(axis=0), len(part)]
            np.testing.assert_allclose(measured.buckets[number, bucket], wanted, rtol=1e-5, atol=1e-5)
    assert len(measured.sums) == len(corpus.windows)
    assert measured.tokens == sum(len(window.tokens) for window in corpus.windows)
    assert measured.tokens_per_second > 0
    assert measured.has_teacher
    agreements = measured.sums[:, AGREEMENT]
    assert np.array_equal(agreements, agreements.round())


def test_a_model_is_no_distance_from_itself(subjects: tuple[Subject, Subject], corpus: Corpus) -> None:
    source = source_of(subjects[0])
    measured = _measure(Stream(source), corpus, Stream(source))
    assert (measured.sums[:, KL] == 0).all()
    assert np.array_equal(measured.sums[:, LOSS], measured.sums[:, TEACHER_LOSS])
    assert np.array_equal(measured.sums[:, AGREEMENT], measured.positions)
    np.testing.assert_allclose(measured.sums[:, ESAP], measured.positions, rtol=1e-6)


def test_a_teacher_changes_no_loss(streams: tuple[Stream, Stream], corpus: Corpus, measured: Measurement) -> None:
    alone = _measure(streams[0], corpus)
    assert not alone.has_teacher
    assert np.array_equal(alone.sums[:, LOSS], measured.sums[:, LOSS])
    assert (alone.sums[:, 1:] == 0).all()


@pytest.mark.parametrize(("rows", "block"), [(1, 2048), (3, 1), (3, 7), (20, 64)])
def test_neither_batches_nor_blocks_of_positions_matter(
    rows: int,
    block: int,
    streams: tuple[Stream, Stream],
    corpus: Corpus,
    measured: Measurement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert rows != rows_for(LENGTH)
    monkeypatch.setattr(streams[0].source, "scratch", Scratch(positions=block))
    again = _measure(streams[0], corpus, streams[1], rows)
    np.testing.assert_allclose(again.buckets, measured.buckets, rtol=1e-5, atol=1e-5)
    for name in ("domain", "document", "positions"):
        assert np.array_equal(getattr(again, name), getattr(measured, name))


def test_checkpoints_of_different_vocabularies_are_not_compared(
    streams: tuple[Stream, Stream], corpus: Corpus, tmp_path: Path
) -> None:
    other = stream_of(saved(small_model("mixtral", vocab_size=VOCABULARY + 1), tmp_path / "other"))
    with pytest.raises(UsageError, match=r"vocabularies differ \(96 and 97 tokens\)") as raised:
        _measure(streams[0], corpus, other)
    assert raised.value.exit_code == 2


def test_the_model_is_not_asked_for_logits_of_padding_or_for_a_cache(
    streams: tuple[Stream, Stream], corpus: Corpus
) -> None:
    """Whatever padding holds, the sums are the same: a longer neighbour changes nothing."""
    short = min(corpus.windows, key=lambda window: len(window.tokens))
    domain = [window for window in corpus.windows if window.domain == short.domain]
    alone = _measure(streams[0], corpus_of([short]))
    among = _measure(streams[0], corpus_of(domain))
    row = int(np.flatnonzero(among.positions == len(short.tokens) - 1)[0])
    np.testing.assert_allclose(among.sums[row, LOSS], alone.sums[0, LOSS], rtol=1e-5)
