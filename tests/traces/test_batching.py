import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.traces.batching import _BATCH_COSTS, batches
from moesurgeon.traces.windows import SHORTEST, Window


def _windows(lengths: list[int]) -> list[Window]:
    return [Window("d", number, 0, np.zeros(length, np.int32)) for number, length in enumerate(lengths)]


def _lengths(groups: list[list[Window]]) -> list[list[int]]:
    return [[len(window.tokens) for window in group] for group in groups]


def _padding(groups: list[list[Window]]) -> float:
    places = sum(len(group) * len(group[0].tokens) for group in groups)
    return 1 - sum(len(window.tokens) for group in groups for window in group) / places


LENGTHS = st.lists(st.integers(SHORTEST, 100), max_size=40)


@given(LENGTHS, st.integers(1, 7), st.sampled_from([0, 200, 8192]))
def test_batches_hold_every_window_once_and_the_longest_first(lengths: list[int], rows: int, tokens: int) -> None:
    windows = _windows(lengths)
    groups = list(batches(windows, rows, tokens))
    flat = [window for group in groups for window in group]
    assert sorted(map(id, flat)) == sorted(map(id, windows))
    assert [len(window.tokens) for window in flat] == sorted(map(len, (window.tokens for window in windows)))[::-1]
    same = [window.document for window in flat]
    assert all(a < b for a, b in itertools.pairwise(same) if lengths[a] == lengths[b])
    for group in groups:
        assert len(group) <= rows or (len(group) <= 64 and len(group) * len(group[0].tokens) <= tokens)
    assert _lengths(groups) == _lengths(list(batches(windows, rows, tokens)))


@given(st.lists(st.integers(SHORTEST, 2000), min_size=1, max_size=9), st.integers(1, 4))
def test_no_other_division_costs_less(lengths: list[int], rows: int) -> None:
    def cost(groups: list[list[int]]) -> int:
        return sum(len(group) * group[0] + _BATCH_COSTS for group in groups)

    ordered = sorted(lengths, reverse=True)
    best = min(
        cost(groups)
        for cuts in itertools.product((False, True), repeat=len(ordered) - 1)
        for groups in [_cut(ordered, cuts)]
        if max(map(len, groups)) <= rows
    )
    assert cost(_lengths(list(batches(_windows(lengths), rows)))) == best


def _cut(ordered: list[int], cuts: tuple[bool, ...]) -> list[list[int]]:
    groups = [[ordered[0]]]
    for length, cut in zip(ordered[1:], cuts, strict=True):
        if cut:
            groups.append([length])
        else:
            groups[-1].append(length)
    return groups


def test_batches_of_short_windows_have_more_rows() -> None:
    windows = _windows([4096, 300, *[20] * 150])
    assert [len(group) for group in batches(windows, 1)] == [1] * 152
    sizes = _lengths(list(batches(windows, 1, 4096)))
    assert [len(group) for group in sizes] == [1, 1, 64, 64, 22]
    assert all(len(group) * group[0] <= 4096 for group in sizes)


@pytest.mark.parametrize(("typical", "spread", "most"), [(50, 0.6, 0.07), (150, 1.0, 0.08)])
def test_short_documents_are_hardly_padded(typical: int, spread: float, most: float) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(typical), spread, 5000)
    lengths = np.clip(drawn, SHORTEST, 512).astype(int)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), 65_536)]
    groups = list(batches(_windows(lengths.tolist()), 16, 8192))
    assert _padding(groups) < most
    assert len(groups) < 25
