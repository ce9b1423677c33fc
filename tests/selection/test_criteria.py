"""Criteria against their formulas, written out for single experts."""

from __future__ import annotations

import numpy as np
import pytest

from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.profiling.statistics import PEAK, PER_EXPERT, Statistics
from moesurgeon.selection.criteria import COUNTING, CRITERIA, scores_of

NEVER = (1, 2)  # a layer's row and the expert in it that no token was routed to


def _tokens() -> dict[tuple[int, int, int], list[tuple[float, float]]]:
    """(weight, norm) of every token by domain, layer and expert: 2 domains, 2 layers, 4 experts."""
    random = np.random.default_rng(0)
    return {
        (domain, layer, expert): [(random.uniform(), random.uniform(0.5, 5)) for _ in range(random.integers(1, 6))]
        for domain in range(2)
        for layer in range(2)
        for expert in range(4)
        if (layer, expert) != NEVER
    }


@pytest.fixture
def statistics() -> Statistics:
    result = Statistics.empty(("one", "two"), (3, 5), 4, 2)
    for place, pairs in _tokens().items():
        w, f = np.array(pairs).T
        values = (len(w), w.sum(), f.sum(), (f**2).sum(), (w * f).sum(), ((w * f) ** 2).sum(), len(w))
        domain, layer, expert = place
        for name, value in zip(PER_EXPERT, values, strict=True):
            result.sums[name][domain, expert % 5, layer, expert] = value
        result.sums[PEAK][domain, expert % 5, layer, expert] = (w * f).max()
    return result


FORMULAS = {
    "frequency": lambda w, f: len(w),
    "gate": lambda w, f: w.sum(),
    "ean": lambda w, f: f.sum(),
    "man": lambda w, f: f.mean(),
    "reap": lambda w, f: (w * f).mean(),
    "traffic-reap": lambda w, f: (w * f).sum(),
}


@pytest.mark.parametrize("criterion", FORMULAS)
def test_scores_are_those_of_the_formula(criterion: str, statistics: Statistics) -> None:
    scores = scores_of(statistics, criterion)
    assert scores.shape == (2, 4)
    for layer in range(2):
        for expert in range(4):
            if (layer, expert) == NEVER:
                continue
            # Both domains together: the mean over tokens, not the mean of the domains' means.
            pairs = [pair for domain in range(2) for pair in _tokens()[domain, layer, expert]]
            w, f = np.array(pairs).T
            assert scores[layer, expert] == pytest.approx(FORMULAS[criterion](w, f), rel=1e-12)


@pytest.mark.parametrize("criterion", FORMULAS)
def test_an_expert_that_was_never_routed_scores_lowest(criterion: str, statistics: Statistics) -> None:
    scores = scores_of(statistics, criterion)
    assert np.isfinite(scores).all()
    assert scores[NEVER[0]].argmin() == NEVER[1]
    assert scores[NEVER] == 0.0


def test_criteria_disagree(statistics: Statistics) -> None:
    """Else a test of one would be a test of all."""
    scores = [scores_of(statistics, criterion) for criterion in CRITERIA]
    for number, one in enumerate(scores):
        assert not any(np.allclose(one, other) for other in scores[number + 1 :])


def test_random_is_the_seed_s(statistics: Statistics) -> None:
    assert np.array_equal(scores_of(statistics, "random", 1), scores_of(statistics, "random", 1))
    assert not np.array_equal(scores_of(statistics, "random", 1), scores_of(statistics, "random", 2))
    assert scores_of(statistics, "random").shape == (2, 4)
    # Only random listens to the seed.
    assert np.array_equal(scores_of(statistics, "reap", 1), scores_of(statistics, "reap", 2))


def test_an_unknown_criterion_lists_the_known_ones(statistics: Statistics) -> None:
    with pytest.raises(UsageError, match="--criterion best is not one of frequency, gate, ean, man, reap") as raised:
        scores_of(statistics, "best")
    assert raised.value.exit_code == 2
    assert set(FORMULAS) | {"random"} == set(CRITERIA)


def test_scoring_changes_no_profile(statistics: Statistics) -> None:
    before = {name: array.copy() for name, array in statistics.sums.items()}
    for criterion in CRITERIA:
        scores_of(statistics, criterion)[:] = 0.0
    assert all(np.array_equal(statistics.sums[name], array) for name, array in before.items())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_server_s_counts_serve_counting_only(criterion: str, statistics: Statistics) -> None:
    for name, array in statistics.sums.items():
        if name != "tokens":
            array[:] = 0.0
    if criterion in COUNTING:
        assert scores_of(statistics, criterion).shape == (2, 4)
    else:
        with pytest.raises(ProfileError, match="choose by --criterion frequency"):
            scores_of(statistics, criterion)
