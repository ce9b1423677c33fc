"""The costly search against brute force, and how little it asks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from moesurgeon.selection.costly import FIRST, search_costly
from moesurgeon.selection.search import number_of_subsets

Subset = tuple[int, ...]
EXPERTS, COUNT = 12, 9


class Case:
    """Dropped experts that stand in for each other: x Q x of those that went, and a cheap measure near it."""

    def __init__(self, seed: int, noise: float = 0.15) -> None:
        random = np.random.default_rng(seed)
        root = random.normal(size=(EXPERTS, EXPERTS)) * random.uniform(0.3, 1.0, EXPERTS)
        self._gram, self._seed, self._noise = root @ root.T, seed, noise
        self.asked: list[Subset] = []
        self.made = 0

    def cost(self, kept: Subset) -> float:
        self.asked.append(kept)
        return self.true(kept)

    def true(self, kept: Subset) -> float:
        gone = np.array([expert not in kept for expert in range(EXPERTS)], float)
        return float(gone @ self._gram @ gone)

    def cheap(self) -> Callable[[np.ndarray], np.ndarray]:
        self.made += 1

        def bound(kept: np.ndarray) -> np.ndarray:
            found = []
            for row in kept:
                subset = tuple(np.flatnonzero(row).tolist())
                own = np.random.default_rng([self._seed, *subset])
                found.append(self.true(subset) * float(np.exp(self._noise * own.normal())))
            return np.array(found)

        return bound

    def best(self, subsets: list[Subset]) -> Subset:
        return min(subsets, key=lambda kept: (self.true(kept), kept))


def _all(groups: int = 1, fixed: frozenset[int] = frozenset()) -> list[Subset]:
    size = EXPERTS // groups
    return [
        kept
        for kept in itertools.combinations(range(EXPERTS), COUNT)
        if fixed <= set(kept) and {sum(e // size == g for e in kept) for g in range(groups)} == {COUNT // groups}
    ]


@pytest.mark.parametrize(("groups", "fixed"), [(1, frozenset()), (1, frozenset({0, 7})), (3, frozenset({5}))])
def test_few_are_all_measured(groups: int, fixed: frozenset[int]) -> None:
    subsets = _all(groups, fixed)
    assert number_of_subsets(EXPERTS, COUNT, groups=groups, fixed=fixed) == len(subsets)
    for seed in range(5):
        case = Case(seed)
        found = search_costly(
            case.cost, case.cheap, EXPERTS, COUNT, groups=groups, fixed=fixed, few=len(subsets), starts=[range(COUNT)]
        )
        assert found.exact and found.kept == case.best(subsets) and found.error == case.true(found.kept)
        assert sorted(case.asked) == subsets and found.compared == len(subsets) and case.made == 0


@pytest.mark.parametrize(("groups", "fixed"), [(1, frozenset()), (1, frozenset({0, 7})), (3, frozenset({5}))])
def test_a_search_finds_the_best_of_most_cases(groups: int, fixed: frozenset[int]) -> None:
    subsets = _all(groups, fixed)
    hits = 0
    for seed in range(40):
        case = Case(seed)
        found = search_costly(case.cost, case.cheap, EXPERTS, COUNT, groups=groups, fixed=fixed, few=1)
        assert not found.exact and found.kept in subsets and found.error == case.true(found.kept)
        assert len(set(case.asked)) == len(case.asked) == found.compared < len(subsets)
        hits += found.kept == case.best(subsets)
    assert hits >= 38


def test_no_start_is_better() -> None:
    """A cheap measure that says nothing: what others choose is asked for all the same."""
    for seed in range(10):
        case = Case(seed, noise=50.0)
        starts = [case.best(_all()), tuple(range(COUNT)), (0, 1)]  # the last one is no choice of so many
        found = search_costly(case.cost, case.cheap, EXPERTS, COUNT, few=1, starts=starts)
        assert found.kept == starts[0] and found.compared < FIRST + 60
        assert (0, 1) not in case.asked


def test_the_same_each_time() -> None:
    one, two = (
        search_costly(case.cost, case.cheap, EXPERTS, COUNT, few=1) for case in (Case(3, noise=1.0), Case(3, noise=1.0))
    )
    assert one == two


def test_equal_ones_are_settled_by_number() -> None:
    found = search_costly(lambda kept: 1.0, lambda: lambda kept: np.ones(len(kept)), EXPERTS, COUNT, few=1)
    assert found.kept == tuple(range(COUNT))
