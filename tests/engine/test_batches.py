import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesurgeon.engine.batches import batches_of, rows_for, to_batch
from moesurgeon.traces.windows import SHORTEST
from tests.engine.small import corpus_of, random_windows

CPU = torch.device("cpu")


@settings(deadline=None)  # busy machines
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5))
def test_batches_hold_every_token_of_one_domain_once(counts: list[int], rows: int) -> None:
    domains = [random_windows(f"d{n}", count=count, vocabulary=50) for n, count in enumerate(counts)]
    corpus = corpus_of(*domains)
    found = []
    for batch in batches_of(corpus, rows=rows, device=CPU):
        assert len(batch.windows) <= rows
        assert {window.domain for window in batch.windows} == {batch.domain}
        assert batch.text_tokens == int(batch.is_text.sum())
        for row, window in enumerate(batch.windows):
            size = len(window.tokens)
            assert batch.tokens[row, :size].tolist() == window.tokens.tolist()
            assert batch.is_text[row].tolist() == [True] * size + [False] * (batch.tokens.shape[1] - size)
        found += batch.windows
    assert sorted(map(id, found)) == sorted(map(id, corpus.windows))
    assert [window.domain for window in found] == sorted(window.domain for window in found)


def test_a_batch_is_as_long_as_its_longest_window() -> None:
    windows = random_windows("d", count=5, vocabulary=50)
    batch = to_batch(windows, CPU)
    assert batch.tokens.shape == (5, max(len(window.tokens) for window in windows))
    assert batch.tokens.dtype == torch.int64
    assert batch.mask is not None
    assert batch.mask.sum(-1).tolist() == [len(window.tokens) for window in windows]


def test_without_padding_there_is_no_mask() -> None:
    batch = to_batch(random_windows("d", count=3, vocabulary=50, shortest=20, longest=20), CPU)
    assert batch.mask is None
    assert batch.is_text.all()
    assert batch.is_text.shape == batch.tokens.shape


@pytest.mark.parametrize("length", [SHORTEST, 100, 512, 8191, 8192, 100_000])
def test_a_batch_has_about_8192_tokens_and_at_least_a_window(length: int) -> None:
    rows = rows_for(length)
    assert rows >= 1
    assert rows == 1 or rows * length <= 8192 < (rows + 1) * length


def test_token_numbers_of_large_vocabularies_survive() -> None:
    window = random_windows("d", count=1, vocabulary=50)[0]
    window.tokens[:] = np.iinfo(np.int32).max
    assert to_batch([window], CPU).tokens.unique().tolist() == [np.iinfo(np.int32).max]
