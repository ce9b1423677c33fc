"""Repetition against cases counted by hand and a plain reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.evaluation.degeneration import Continuation, degeneration, distinct, loop_at, repeated

few_tokens = st.lists(st.integers(0, 3), max_size=60)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        ([1, 1, 1, 1], 0),  # one 4-gram, once
        ([1, 1, 1, 1, 1], 5),  # the same one twice, overlapping
        ([1, 2, 3, 4, 1, 2, 3, 4], 8),
        ([1, 2, 3, 4, 9, 9, 1, 2, 3, 4], 8),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3, 7], 8),  # three alone are no repetition
        ([1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], 10),
    ],
)
def test_repeated(tokens: Sequence[int], expected: int) -> None:
    assert repeated(tokens) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], None),
        ([1], None),
        ([1, 1], None),
        ([1, 1, 1], 0),
        ([2, 1, 1, 1], 1),
        ([1, 1, 1, 2], None),  # it left the loop
        ([3, 1, 2, 1, 2, 1, 2], 1),
        ([3, 2, 1, 2, 1, 2, 1, 2], 1),  # begins within a round
        ([9, 1, 2, 1, 2, 1], None),  # two and a half
        ([7, 8, *range(16), *range(16), *range(16)], 2),
        ([7, 8, *range(17), *range(17), *range(17)], None),  # the longest period is 16
        ([5, *[1, 1, 2] * 3], 1),
        ([1, 2, 3, 3, 3], 2),
    ],
)
def test_loop_at(tokens: Sequence[int], expected: int | None) -> None:
    assert loop_at(tokens) == expected


@given(few_tokens)
def test_repeated_is_what_a_plain_search_finds(tokens: list[int]) -> None:
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    covered = [
        any(grams.count(grams[start]) > 1 for start in range(max(0, place - 3), min(place + 1, len(grams))))
        for place in range(len(tokens))
    ]
    assert repeated(tokens) == sum(covered)


@given(few_tokens, st.integers(1, 4))
def test_distinct_is_what_a_plain_search_finds(tokens: list[int], size: int) -> None:
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    assert distinct(tokens, size) == (len(set(grams)), len(grams))


@given(few_tokens)
def test_loop_at_is_what_a_plain_search_finds(tokens: list[int]) -> None:
    def is_loop(start: int) -> bool:
        tail = tokens[start:]
        return any(
            len(tail) >= 3 * period and all(tail[i] == tail[i + period] for i in range(len(tail) - period))
            for period in range(1, 17)
        )

    assert loop_at(tokens) == next((start for start in range(len(tokens)) if is_loop(start)), None)


def test_report() -> None:
    looping = Continuation("a", [9, 8, 1, 1, 1, 1, 1, 1], stopped=False)
    good = Continuation("a", [1, 2, 3, 4], stopped=True)
    late = Continuation("b", [5, 6, 7, 5, 5, 5], stopped=False)
    report = degeneration([looping, good, late], ["a", "b", "c"], 8)
    assert (report["prompts"], report["new_tokens"]) == (3, 8)
    assert report["repetition_rate"] == pytest.approx(6 / 18)
    assert report["distinct_1"] == pytest.approx((3 + 4 + 3) / 18)
    assert report["distinct_2"] == pytest.approx((3 + 3 + 4) / (7 + 3 + 5))
    assert report["distinct_4"] == pytest.approx((3 + 1 + 3) / (5 + 1 + 3))
    assert report["loops"] == pytest.approx(2 / 3)
    assert report["first_loop_at"] == pytest.approx(2.5)
    assert report["early_stop"] == pytest.approx(1 / 3)
    assert report["domains"]["a"]["prompts"] == 2
    assert report["domains"]["a"]["loops"] == 0.5
    assert report["domains"]["b"]["first_loop_at"] == 3.0
    assert report["domains"]["b"]["early_stop"] == 0.0
    nothing = report["domains"]["c"]
    assert nothing.pop("prompts") == 0
    assert set(nothing.values()) == {None}


def test_text_of_words_hardly_repeats_and_a_stuck_model_does_nothing_else() -> None:
    random = np.random.default_rng(0)
    text = [Continuation("a", random.integers(0, 2000, 64).tolist(), stopped=False) for _ in range(8)]
    stuck = [Continuation("a", [1, 2, 3] * 21, stopped=False) for _ in range(8)]
    for made, rate in ((text, 0.0), (stuck, 1.0)):
        report = degeneration(made, ["a"], 64)
        assert report["repetition_rate"] == report["loops"] == rate
