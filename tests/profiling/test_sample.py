"""The sample of tokens: uniform, and the same however the text is arranged."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from moesurgeon.profiling.sample import keys_of, sampled_rows
from moesurgeon.traces.windows import Window
from tests.engine.small import batches_for, corpus_of, random_windows

LENGTH = 40
WINDOWS = [
    *random_windows("one", count=9, vocabulary=96, longest=LENGTH),
    *random_windows("two", count=7, vocabulary=96, longest=LENGTH, seed=3),
]
TOKENS = sum(len(window.tokens) for window in WINDOWS)


def _sampled(windows: list[Window], count: int, rows: int | None = None) -> set[tuple[str, bytes, int]]:
    """Return the sample as what is said: domain, text of the window, position in it."""
    domains = dict.fromkeys(window.domain for window in windows)
    corpus = corpus_of(*([window for window in windows if window.domain == domain] for domain in domains))
    batches = batches_for(corpus, LENGTH, rows)
    found = set()
    for batch, places in zip(batches, sampled_rows(batches, count), strict=True):
        assert (np.diff(places) > 0).all()
        assert batch.is_text.flatten()[places].all()
        length = batch.tokens.shape[1]
        for place in places.tolist():
            window = batch.windows[place // length]
            found.add((window.domain, window.tokens.tobytes(), place % length))
    return found


@pytest.mark.parametrize("count", [1, 30, TOKENS - 1, TOKENS, 10 * TOKENS])
def test_so_many_tokens_are_taken(count: int) -> None:
    assert len(_sampled(WINDOWS, count)) == min(count, TOKENS)


@pytest.mark.parametrize("rows", [1, 4])
def test_neither_order_nor_batches_matter(rows: int) -> None:
    order = np.random.default_rng(1).permutation(len(WINDOWS))
    assert _sampled([WINDOWS[place] for place in order], 50, rows) == _sampled(WINDOWS, 50)


def test_a_smaller_sample_is_part_of_a_larger_one_and_more_text_only_replaces() -> None:
    assert _sampled(WINDOWS, 20) < _sampled(WINDOWS, 60)
    part = _sampled(WINDOWS[:9], 40)
    whole = _sampled(WINDOWS, 40)
    of_part = {each for each in whole if each[0] == "one"}
    assert of_part < part


def test_keys_are_uniform_and_depend_on_all_that_is_said() -> None:
    tokens = np.arange(20000, dtype=np.int32)
    window = Window("one", 0, 0, tokens)
    keys = keys_of(window)
    shares = np.bincount((keys >> np.uint64(60)).astype(int), minlength=16) / len(keys)
    assert abs(shares - 1 / 16).max() < 0.01  # four standard deviations are 0.007
    # No trend along the text, and nothing that neighbours have in common.
    ranks = keys.argsort().argsort()
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.03
    assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 0.03
    for other in (
        Window("two", 0, 0, tokens),
        Window("one", 0, 512, tokens),
        Window("one", 0, 0, np.append(tokens[:-1], 7).astype(np.int32)),
    ):
        assert not (keys_of(other) == keys).any()
    assert np.array_equal(keys_of(Window("one", 5, 0, tokens)), keys)  # the document's number is the order's


def test_keys_are_split_mix() -> None:
    """In plain integers: the same on every machine and in every version."""
    tokens = np.arange(8, dtype=np.int32)
    said = b"text" + bytes(1) + b"64" + bytes(1) + b"".join(int(token).to_bytes(4, "little") for token in tokens)
    seed, expected = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big"), []
    for position in range(1, 9):
        key = (seed + position * 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        expected.append(key ^ key >> 31)
    assert keys_of(Window("text", 0, 64, tokens)).tolist() == expected
