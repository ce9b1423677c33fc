"""Dividing experts per token among layers against trying all ways, and which layers would rather keep more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesurgeon.errors import UsageError
from moesurgeon.selection.curves import BEARABLE
from moesurgeon.selection.top_k import TIMES, divided, rather_more


def _by_force(errors_LK: np.ndarray, average: float) -> float:
    layers, most = errors_LK.shape
    return min(
        sum(errors_LK[layer, k - 1] for layer, k in enumerate(counts))
        for counts in itertools.product(range(1, most + 1), repeat=layers)
        if sum(counts) <= average * layers + 1e-9
    )


@pytest.mark.parametrize("shape", ["convex", "any", "rising"])
@pytest.mark.parametrize(("layers", "most"), [(1, 4), (3, 2), (4, 4), (5, 3)])
def test_no_other_division_has_less_error(layers: int, most: int, shape: str) -> None:
    """Whatever the curves look like: greedy steps would do for convex ones only."""
    random = np.random.default_rng([layers, most])
    for _ in range(10):
        errors_LK = random.random((layers, most))
        if shape != "any":
            steps = np.sort(random.random((layers, most)), axis=1)
            errors_LK = np.cumsum(steps, axis=1)[:, :: -1 if shape == "convex" else 1]
        for average in (1.0, 1.3, 1.5, 2.0, float(most)):
            if average > most:
                continue
            counts = divided(errors_LK, average)
            assert len(counts) == layers and all(1 <= k <= most for k in counts)
            assert sum(counts) <= average * layers + 1e-9
            found = sum(errors_LK[layer, k - 1] for layer, k in enumerate(counts))
            assert found == pytest.approx(_by_force(errors_LK, average), abs=1e-12)
            assert divided(errors_LK, average) == counts


def test_a_jump_that_single_steps_do_not_see() -> None:
    """The second expert of layer 0 gains nothing by itself, and the third everything."""
    errors_LK = np.array([[0.9, 0.9, 0.0], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1]])
    assert divided(errors_LK, 5 / 3) == [3, 1, 1]


def test_experts_that_gain_nothing_are_not_handed_out() -> None:
    assert divided(np.array([[0.2, 0.2], [0.4, 0.1], [0.0, 0.0]]), 2.0) == [1, 2, 1]
    assert divided(np.zeros((4, 3)), 3.0) == [1, 1, 1, 1]


def test_averages_of_decimals_are_not_short_of_an_expert() -> None:
    """1.1 x 10 is 11, though 0.1 x 10 in floats may fall short of one."""
    errors_LK = np.tile([[1.0, 0.0]], (10, 1))
    for tenths in range(11):
        assert sum(divided(errors_LK, 1 + tenths / 10)) == 10 + tenths


@pytest.mark.parametrize("average", [0.9, 2.1, -1.0, float("nan"), float("inf")])
def test_averages_that_no_layers_could_have(average: float) -> None:
    with pytest.raises(UsageError, match="is not between 1 and the checkpoint's 2"):
        divided(np.zeros((3, 2)), average)


def test_who_would_rather_keep_more_stands_out_and_suffers() -> None:
    assert rather_more({1: 0.10, 2: 0.10, 3: 0.10 * TIMES + 0.01}) == [3]
    assert rather_more({1: 0.10, 2: 0.10, 3: 0.10 * TIMES}) == []
    assert rather_more({1: 0.4, 2: 0.4, 3: 0.4}) == []  # alike
    assert rather_more({1: 0.001, 2: 0.001, 3: BEARABLE}) == []  # small
    assert rather_more({1: 0.001, 2: 0.001, 3: BEARABLE + 0.001}) == [3]
    assert rather_more({7: 0.5}) == []
