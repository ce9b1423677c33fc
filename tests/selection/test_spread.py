"""One budget over all layers, against the same rule as a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesurgeon.errors import UsageError
from moesurgeon.selection.spread import spread, total_to_drop


def _by_loop(
    rows: list[list[float]], total: int, least: int, groups: int, fixed: dict[int, set[int]]
) -> list[list[int]]:
    """Take the lowest of all that may go, one after the other."""
    kept = [list(range(len(row))) for row in rows]
    size = len(rows[0]) // groups
    relative = [[score / (sum(row) / len(row)) if sum(row) else 1.0 for score in row] for row in rows]
    for _ in range(total):
        may_go = [
            (relative[layer][expert], -layer, -expert)
            for layer, stay in enumerate(kept)
            for expert in stay
            if expert not in fixed.get(layer, ()) and sum(other // size == expert // size for other in stay) > least
        ]
        _score, layer, expert = min(may_go)
        kept[-layer].remove(-expert)
    return kept


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_loop_says_the_same(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2]))
    # Sums of eight in powers of two: no mean is rounded, and ties are common.
    row = st.lists(st.integers(0, 3), min_size=8, max_size=8)
    rows = [list(map(float, each)) for each in data.draw(st.lists(row, min_size=1, max_size=4))]
    least = data.draw(st.integers(1, 3))
    fixed = {
        layer: data.draw(st.sets(st.integers(0, 7), max_size=3))
        for layer in range(len(rows))
        if data.draw(st.booleans())
    }
    size = 8 // groups
    room = sum(
        min(size - least, size - sum(e // size == g for e in fixed.get(layer, ())))
        for layer in range(len(rows))
        for g in range(groups)
    )
    total = data.draw(st.integers(0, room))
    layers = tuple(range(5, 5 + len(rows)))
    kept = spread(np.array(rows), layers, total, least, groups, fixed={5 + layer: of for layer, of in fixed.items()})
    assert list(kept) == list(layers)
    assert [list(of) for of in kept.values()] == _by_loop(rows, total, least, groups, fixed)


def test_a_layer_of_large_scores_is_not_spared() -> None:
    scores = np.array([[1.0, 2.0, 3.0, 4.0], [1000.0, 2000.0, 3000.0, 4000.0]])
    assert spread(scores, (0, 1), 4, 1) == {0: (2, 3), 1: (2, 3)}
    assert spread(scores * [[1], [0]], (0, 1), 3, 1) == {0: (2, 3), 1: (0, 1, 2)}  # nothing is known of the second


def test_how_many_go() -> None:
    assert total_to_drop(8, 3, keep=6, ratio=None, least=2) == 6
    assert total_to_drop(8, 3, keep=None, ratio=0.1, least=2) == 2  # of 24
    assert total_to_drop(10, 10, keep=None, ratio=0.29, least=2) == 29
    for wrong, says in (
        ({"keep": 9, "ratio": None}, "cannot keep 9"),
        ({"keep": 1, "ratio": None}, "keep at least 2"),
        ({"keep": None, "ratio": 0.04}, "of 24 experts is less than one"),
        ({"keep": None, "ratio": 0.8}, r"under 2 experts.* at most 0\.75"),
    ):
        with pytest.raises(UsageError, match=says):
            total_to_drop(8, 3, **wrong, least=2)
