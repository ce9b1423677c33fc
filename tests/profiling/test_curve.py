"""The curve of milliseconds over tokens, on data whose law is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurgeon.profiling.curve import MOST_KNOTS, Curve, fitted, isotonic

TOKENS = [float(1 << power) for power in range(13)]
VALUES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=13)


@given(VALUES)
def test_isotonic_regression_is_the_nearest_rising_sequence(values: list[float]) -> None:
    """Against its definition by extremes of means: max over starts, min over ends (min-max formula)."""
    y = np.array(values)
    expected = [max(min(y[a : b + 1].mean() for b in range(at, len(y))) for a in range(at + 1)) for at in range(len(y))]
    np.testing.assert_allclose(isotonic(y), expected, rtol=1e-9)


@given(VALUES)
def test_a_curve_rises_has_few_knots_and_stays_within_what_was_measured(values: list[float]) -> None:
    curve = fitted(TOKENS[: len(values)], values)
    assert len(curve.knots) <= MOST_KNOTS
    at = np.linspace(0, 3 * TOKENS[len(values) - 1], 500)
    assert (np.diff(curve(at)) >= -1e-9 * curve(at)[1:]).all()
    measured = curve(np.array(TOKENS[: len(values)]))
    assert measured.min() >= min(values) * (1 - 1e-9) and measured.max() <= max(values) * (1 + 1e-9)


def _law(tokens: np.ndarray) -> np.ndarray:
    """Weights are read in any case; from 300 tokens on products take longer than that."""
    return np.maximum(0.05, 0.05 * tokens / 300) + 0.002


def test_a_law_of_two_pieces_is_found() -> None:
    x = np.array(TOKENS)
    rng = np.random.default_rng(0)
    curve = fitted(TOKENS, (_law(x) * np.exp(rng.normal(0, 0.01, len(x)))).tolist())
    between = np.geomspace(1, 4096, 200)
    relative = curve(between) / _law(between) - 1
    assert abs(relative).max() < 0.25  # at the bend, which lies between two measurements
    assert np.median(abs(relative)) < 0.03
    # On beyond what was measured: in proportion.
    assert float(curve(20000.0)) == pytest.approx(float(_law(np.array(20000.0))), rel=0.1)


def test_a_straight_line_needs_two_knots() -> None:
    curve = fitted(TOKENS, [0.5 + 0.01 * x for x in TOKENS])
    assert len(curve.knots) == 2
    np.testing.assert_allclose(curve(np.array([1.0, 77.0, 4096.0])), [0.51, 1.27, 41.46], rtol=1e-9)


def test_nothing_takes_no_time_and_one_point_is_a_curve() -> None:
    assert Curve((4.0,), (2.0,))(np.array([0.0, 2.0, 4.0, 8.0])).tolist() == [0.0, 1.0, 2.0, 4.0]
    assert fitted([1.0], [3.0]).knots == [[1.0, pytest.approx(3.0)]]
