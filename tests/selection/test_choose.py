from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.errors import UsageError
from moesurgeon.selection.choose import best, count_to_keep

# Few different values: ties are common.
SCORES = st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=3)


@given(SCORES, st.integers(1, 8))
def test_the_best_stay_and_ties_go_to_the_lower_number(rows: list[list[int]], count: int) -> None:
    layers = tuple(range(2, 2 + len(rows)))
    kept = best(np.array(rows, dtype=float), layers, count)
    assert tuple(kept) == layers
    for layer, row in zip(layers, rows, strict=True):
        expected = sorted(sorted(range(8), key=lambda expert: (-row[expert], expert))[:count])
        assert kept[layer] == tuple(expected)
        # By the definition: of all choices none has a higher sum.
        assert sum(row[e] for e in kept[layer]) == max(map(sum, itertools.combinations(row, count)))


@given(SCORES, st.sampled_from([(1, 1), (2, 2), (2, 6), (4, 4), (4, 8)]))
def test_every_group_keeps_as_many_of_its_best(rows: list[list[int]], case: tuple[int, int]) -> None:
    groups, count = case
    kept = best(np.array(rows, dtype=float), tuple(range(len(rows))), count, groups)
    size = 8 // groups
    for layer, row in enumerate(rows):
        assert list(kept[layer]) == sorted(kept[layer])
        for group in range(groups):
            mine = range(group * size, (group + 1) * size)
            expected = sorted(mine, key=lambda expert: (-row[expert], expert))[: count // groups]
            assert [expert for expert in kept[layer] if expert in mine] == sorted(expected)


def test_scores_below_zero_and_huge_ones_are_ordered_as_any_others() -> None:
    scores = np.array([[-1.0, 1e300, -1e300, 0.0, -0.0, 5e-324]])
    assert best(scores, (0,), 4) == {0: (1, 3, 4, 5)}
    assert best(scores, (0,), 3) == {0: (1, 3, 5)}


def test_experts_that_nobody_used_go_first_the_highest_number_first() -> None:
    assert best(np.array([[0.0, 2.0, 0.0, 0.0]]), (0,), 3) == {0: (0, 1, 2)}


def test_choosing_leaves_the_scores_alone() -> None:
    scores = np.array([[3.0, 1.0, 2.0]])
    best(scores, (0,), 2)
    assert scores.tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("experts", "ratio", "kept"),
    [
        (8, 0.25, 6),
        (8, 0.3, 6),  # 2.4 experts: two go
        (64, 0.5, 32),
        (16, 0.999, 1),
        (10, 0.1, 9),  # 10 x 0.1 is 1, whatever floating point makes of it
        (10, 0.7, 3),
        (100, 0.29, 71),  # 28.999999999999996 in floating point
    ],
)
def test_a_ratio_is_the_share_that_goes(experts: int, ratio: float, kept: int) -> None:
    assert count_to_keep(experts, keep=None, ratio=ratio) == kept


@given(st.integers(2, 512), st.floats(0.001, 0.999))
def test_a_ratio_removes_no_more_than_it_says_and_never_everything(experts: int, ratio: float) -> None:
    if experts * ratio < 1 - 1e-6:
        with pytest.raises(UsageError, match="nothing would be removed"):
            count_to_keep(experts, keep=None, ratio=ratio)
    elif experts * ratio > 1:
        kept = count_to_keep(experts, keep=None, ratio=ratio)
        assert 1 <= kept < experts
        assert experts - kept <= experts * ratio + 1e-6 < experts - kept + 1 + 1e-5


def test_a_count_is_taken_as_it_is() -> None:
    assert [count_to_keep(8, keep=keep, ratio=None) for keep in (1, 6, 8)] == [1, 6, 8]


@pytest.mark.parametrize(("keep", "ratio"), [(None, None), (6, 0.25)])
def test_exactly_one_of_count_and_ratio_is_needed(keep: int | None, ratio: float | None) -> None:
    with pytest.raises(UsageError, match=r"give --keep N, --ratio R or --below S \(one of them\)") as raised:
        count_to_keep(8, keep=keep, ratio=ratio)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 25.0, float("nan"), float("inf")])
def test_a_ratio_outside_0_and_1_is_wrong_usage(ratio: float) -> None:
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        count_to_keep(8, keep=None, ratio=ratio)


def test_a_ratio_of_less_than_one_expert_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match=r"--ratio 0\.1 of 8 experts is less than one"):
        count_to_keep(8, keep=None, ratio=0.1)


def test_a_share_of_tokens_leaves_the_count_to_the_profile() -> None:
    assert count_to_keep(8, keep=None, ratio=None, below=0.005) is None
    for other in ({"keep": 6, "ratio": None}, {"keep": None, "ratio": 0.5}):
        with pytest.raises(UsageError, match="one of them"):
            count_to_keep(8, **other, below=0.005)
    for below in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="it is a share of the tokens"):
            count_to_keep(8, keep=None, ratio=None, below=below)
