"""The subset that costs least where a measurement is costly, and a cheap one tells which are worth it.

Where there are few subsets each is measured. Above that the cheap measure is searched first (``selection.search``);
the cheapest that it met, and the choices of others, are measured at cost. From the best of those swaps begin, of
which again only the cheapest are measured, until none is better.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from moesurgeon.selection.search import Errors, Found, Limits, Measured, number_of_subsets, search, without

FEW = 64
"""So many subsets are all measured."""
FIRST, NEXT = 24, 12
"""Subsets that are measured at first, and in each round of swaps."""
_SEARCHED = 256  # of the cheap measure all of so many; above that a search


def search_costly(
    cost: Callable[[tuple[int, ...]], float],
    cheap: Callable[[], Errors],
    experts: int,
    count: int,
    *,
    groups: int = 1,
    fixed: Collection[int] = (),
    starts: Sequence[Sequence[int]] = (),
    few: int = FEW,
) -> Found:
    """Return the best ``count`` of ``experts`` as :func:`search` does; ``cost`` was asked as often as it says.

    ``cheap`` makes the cheap measure, if it is needed. The result costs no more than any of ``starts``.
    """

    def one_by_one(kept: np.ndarray) -> np.ndarray:
        return np.array([cost(tuple(np.flatnonzero(row).tolist())) for row in kept])

    if number_of_subsets(experts, count, groups=groups, fixed=fixed) <= few:
        return search(one_by_one, experts, count, groups=groups, fixed=fixed, enumerated=few)
    bounds, costs = Measured(cheap(), experts), Measured(one_by_one, experts)
    search(bounds, experts, count, groups=groups, fixed=fixed, starts=starts, enumerated=_SEARCHED)
    limits = Limits(experts // groups, count // groups, frozenset(fixed))
    costs(bounds.cheapest(count, limits, groups)[:FIRST])
    costs([kept for start in starts if limits.allow(kept := tuple(sorted(start)), groups)])
    best = costs.cheapest(count, limits, groups)[0]
    while True:
        near = _neighbours(bounds, best, experts, limits, _SEARCHED)
        new = [kept for kept in near if not costs.knows(kept)]
        by_bound = sorted(zip(bounds(new), new, strict=True))
        costs([kept for _bound, kept in by_bound[:NEXT]])
        before, best = best, costs.cheapest(count, limits, groups)[0]
        if best == before:
            return Found(best, costs([best])[0], costs.count, exact=False)


def _neighbours(
    measured: Measured, kept: tuple[int, ...], experts: int, limits: Limits, most: int
) -> list[tuple[int, ...]]:
    """Return what ``kept`` is after one swap, each that ``limits`` allow; of more than ``most`` the promising ones."""
    outside = [expert for expert in range(experts) if expert not in kept]
    pairs = [
        (gone, come)
        for gone in kept
        for come in outside
        if gone not in limits.fixed and gone // limits.size == come // limits.size
    ]
    if len(pairs) > most:
        pairs = _promising(measured, kept, pairs, most)
    return [tuple(sorted((*without(kept, gone), come))) for gone, come in pairs]


def _promising(
    measured: Measured, kept: tuple[int, ...], pairs: list[tuple[int, int]], most: int
) -> list[tuple[int, int]]:
    """Return the pairs of which the one is missed least, and the other would be welcome most, each on its own."""
    goers = sorted({gone for gone, _ in pairs})
    comers = sorted({come for _, come in pairs})
    missed = dict(zip(goers, measured.without(kept, goers), strict=True))
    welcome = dict(zip(comers, measured([tuple(sorted((*kept, come))) for come in comers]), strict=True))
    return sorted(pairs, key=lambda pair: (missed[pair[0]] + welcome[pair[1]], pair))[:most]
