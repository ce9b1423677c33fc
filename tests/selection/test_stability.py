"""Whether a choice would stand on other text."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from moesurgeon.profiling.statistics import FOLDS, Statistics
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import CRITERIA, scores_of
from moesurgeon.selection.stability import Stability, errors_of, rank_agreement, stability
from tests.profiling.made import Made, random_documents, statistics_of

SEEDED = [name for name in CRITERIA if name != "random"]
WIDE = np.array([[0.2, 0.2, 0.2, 0.2, 0.15, 0.03, 0.01, 0.01]])
EVEN = np.full((1, 8), 1 / 8)


def _made(share: np.ndarray, count: int, seed: int = 0, concentration: float = 20.0) -> Statistics:
    return statistics_of(random_documents(np.random.default_rng(seed), share, count, concentration=concentration))


def _stability(statistics: Statistics, criterion: str, count: int) -> Stability | None:
    return stability(statistics, criterion, partial(best, layers=statistics.layers, count=count))


@pytest.mark.parametrize("criterion", ["frequency", "gate", "ean", "traffic-reap"])
def test_a_wide_margin_changes_nothing(criterion: str) -> None:
    found = _stability(_made(WIDE, 400, concentration=200.0), criterion, 5)
    assert found is not None
    assert (found.changed, found.worst, found.is_settled) == (0.0, 0.0, True)
    assert found.tokens is not None and found.tokens < 400 * 400  # less than there was


def test_a_coin_flip_changes_about_half() -> None:
    """Eight experts alike in truth, of which two go: half of the text chooses otherwise about every second time."""
    found = [_stability(_made(EVEN, 80, seed), "frequency", 6) for seed in range(30)]
    changed = np.mean([each.changed for each in found if each is not None])
    assert 0.35 < changed < 0.6
    assert not any(each.is_settled for each in found if each is not None)
    needed = [np.inf if each is None or each.tokens is None else each.tokens for each in found]
    assert np.median(needed) > 80 * 250  # more than there was


@pytest.mark.parametrize("criterion", SEEDED)
def test_changes_are_those_of_every_half(criterion: str) -> None:
    random = np.random.default_rng(4)
    documents = [
        Made("text", made.length, made.tokens, made.fold, random.uniform(0.5, 2.0, EVEN.shape))
        for made in random_documents(random, EVEN, 24)
    ]
    whole = statistics_of(documents)
    kept = best(scores_of(whole, criterion), (0,), 5)[0]
    changes = []
    for folds in itertools.combinations(range(FOLDS), 4):
        half = statistics_of([made for made in documents if made.fold % FOLDS in folds])
        again = best(scores_of(half, criterion), (0,), 5)[0]
        dropped = set(range(8)) - set(kept)
        changes.append(len([expert for expert in dropped if expert in again]) / 3)
    assert len(changes) == 70
    found = _stability(whole, criterion, 5)
    assert found is not None and found.changed == pytest.approx(np.mean(changes))


def test_the_worst_layer_is_named() -> None:
    found = _stability(_made(np.concatenate([WIDE, EVEN, WIDE]), 200, concentration=100.0), "frequency", 6)
    assert found is not None
    assert found.worst_layer == 1 and found.worst > found.changed > 0
    assert found.as_dict() == {
        "changed": found.changed, "worst": found.worst, "worst_layer": 1, "tokens": found.tokens, "settled": False
    }  # fmt: skip


def test_halves_that_have_all_or_nothing_do_not_count() -> None:
    """Two documents in two folds: each proper half is one of them, and they disagree with each other."""
    tokens = np.array([[60.0, 0.0, 40.0]]), np.array([[0.0, 50.0, 50.0]])
    statistics = statistics_of([Made("text", 100, each, fold) for fold, each in enumerate(tokens)])
    found = _stability(statistics, "frequency", 2)  # all: 1 goes; the first: 1, the second: 0
    assert found is not None and found.changed == 0.5


def test_one_fold_or_a_seed_tells_nothing() -> None:
    one = statistics_of([Made("text", 100, np.array([[60.0, 40.0]]), fold=3) for _ in range(5)])
    assert _stability(one, "frequency", 1) is None
    assert _stability(_made(EVEN, 20), "random", 6) is None
    assert errors_of(one, "random") is None


def test_tokens_needed_shrink_with_the_square_of_the_margin() -> None:
    near, far = (np.array([[0.5 - gap, 0.25 + gap, 0.25]]) for gap in (0.01, 0.04))
    needed = [
        np.median([found.tokens for seed in range(15)
                   if (found := _stability(_made(share, 300, seed, 100.0), "frequency", 2)) and found.tokens])
        for share in (near, far)
    ]  # fmt: skip
    assert 6 < needed[0] / needed[1] < 40  # 16 in the limit


def test_agreement_is_spearman_s() -> None:
    one = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    assert rank_agreement(one, one * 10 + 3) == pytest.approx(1.0)
    assert rank_agreement(one, -one) == pytest.approx(-1.0)
    other = np.array([[2.0, 1.0, 4.0, 3.0]])
    assert rank_agreement(one[:1], other) == pytest.approx(1 - 6 * 4 / (4 * 15))  # 1 - 6 sum d^2 / n (n^2 - 1)
