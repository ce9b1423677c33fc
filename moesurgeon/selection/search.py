"""The subset of a layer's experts that costs least, by any measure of a subset: all of them, or the best found.

Where there are few subsets each is measured. Above that experts go one after the other, always the one whose loss
costs least (backward elimination), and then are swapped with those that went for as long as that gains anything.
Of routing groups each loses the same number. Nothing here knows what is measured.

Legend: S subsets, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesurgeon.profiling.statistics import Array

Errors = Callable[[NDArray[np.bool_]], Array]
"""The cost [S] of keeping only the experts ``kept`` [S, E]; NaN counts as the worst."""

ENUMERATED = 4096
"""So many subsets are all measured."""
_ROUNDS = 64  # of swaps at most; a few are usual


@dataclass(frozen=True)
class Found:
    """``kept``, ascending, and its ``error``; ``compared`` subsets were measured, and if ``exact`` that was all."""

    kept: tuple[int, ...]
    error: float
    compared: int
    exact: bool


def search(
    errors: Errors | Measured,
    experts: int,
    count: int,
    *,
    groups: int = 1,
    fixed: Collection[int] = (),
    starts: Sequence[Sequence[int]] = (),
    enumerated: int = ENUMERATED,
) -> Found:
    """Return the best ``count`` of ``experts`` that hold all ``fixed`` ones, ``count / groups`` of each group.

    Of equal ones that with the lower numbers. ``starts``: choices of others, from which swaps begin as well where
    not all are measured; the result costs no more than any of them. ``fixed`` must fit the groups.
    """
    size, each = experts // groups, count // groups
    held = [[e for e in range(g * size, (g + 1) * size) if e in set(fixed)] for g in range(groups)]
    assert all(len(part) <= each for part in held), "more experts are fixed than can stay"
    measured = errors if isinstance(errors, Measured) else Measured(errors, experts)
    if number_of_subsets(experts, count, groups=groups, fixed=fixed) <= enumerated:
        subsets = list(_all(size, each, held))
        best = min(zip(measured(subsets), subsets, strict=True))  # ties: the first in order
        return Found(best[1], best[0], measured.count, exact=True)
    limits = Limits(size, each, frozenset(fixed))
    ends = [_eliminated(measured, experts, count, limits)]
    ends += [tuple(sorted(start)) for start in starts if limits.allow(start, groups)]
    swapped = [_swapped(measured, end, experts, limits, enumerated) for end in dict.fromkeys(ends)]
    error, kept = min(swapped)
    return Found(kept, error, measured.count, exact=False)


def number_of_subsets(experts: int, count: int, *, groups: int = 1, fixed: Collection[int] = ()) -> int:
    """Return how many choices there are.

    >>> number_of_subsets(8, 6), number_of_subsets(8, 6, groups=2), number_of_subsets(8, 6, fixed=[0])
    (28, 16, 21)
    """
    size, each = experts // groups, count // groups
    held = [sum(expert // size == group for expert in set(fixed)) for group in range(groups)]
    return math.prod(math.comb(size - part, each - part) if part <= each else 0 for part in held)


def nested(
    errors: Errors, experts: int, least: int, *, groups: int = 1, fixed: Collection[int] = ()
) -> list[tuple[tuple[int, ...], float]]:
    """Return what backward elimination keeps and costs with all experts, then each time one less of every group.

    Down to ``least`` experts: each choice is within the one before, so that this is a curve of error against count.
    """
    size = experts // groups
    measured = Measured(errors, experts)
    kept = tuple(range(experts))
    curve = [(kept, measured([kept])[0])]
    while len(kept) - groups >= max(least, len(set(fixed))):
        limits = Limits(size, len(kept) // groups - 1, frozenset(fixed))
        if any(not limits.removable(kept, group) for group in range(groups)):
            break
        kept = _eliminated(measured, experts, len(kept) - groups, limits, start=kept)
        curve.append((kept, measured([kept])[0]))
    return curve


class Measured:
    """Remembers what was measured; :func:`search` takes one to leave behind what it saw."""

    def __init__(self, errors: Errors, experts: int) -> None:
        self._errors, self._experts = errors, experts
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def count(self) -> int:
        return len(self._known)

    def knows(self, subset: tuple[int, ...]) -> bool:
        return subset in self._known

    def cheapest(self, size: int, limits: Limits, groups: int) -> list[tuple[int, ...]]:
        """Return what was measured of ``size`` experts within ``limits``, the cheapest first."""
        mine = [subset for subset in self._known if len(subset) == size and limits.allow(subset, groups)]
        return sorted(mine, key=lambda subset: (self._known[subset], subset))

    def __call__(self, subsets: Sequence[tuple[int, ...]]) -> list[float]:
        new = [subset for subset in dict.fromkeys(subsets) if subset not in self._known]
        if new:
            kept = np.zeros((len(new), self._experts), dtype=bool)
            for row, subset in enumerate(new):
                kept[row, list(subset)] = True
            found = np.nan_to_num(np.asarray(self._errors(kept), dtype=np.float64), nan=np.inf)
            self._known.update(zip(new, found.tolist(), strict=True))
        return [self._known[subset] for subset in subsets]


@dataclass(frozen=True)
class Limits:
    """Groups of ``size`` that keep ``each``, ``fixed`` among them."""

    size: int
    each: int
    fixed: frozenset[int]

    def removable(self, kept: Sequence[int], group: int) -> list[int]:
        """Return who of ``group`` may go, the higher numbers first."""
        mine = [expert for expert in kept if expert // self.size == group]
        return [expert for expert in reversed(mine) if expert not in self.fixed] if len(mine) > self.each else []

    def allow(self, kept: Sequence[int], groups: int) -> bool:
        counts = [sum(expert // self.size == group for expert in kept) for group in range(groups)]
        return self.fixed <= set(kept) and set(counts) == {self.each}


def _all(size: int, each: int, held: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    by_group = []
    for group, part in enumerate(held):
        free = [expert for expert in range(group * size, (group + 1) * size) if expert not in part]
        by_group.append([tuple(sorted((*part, *some))) for some in itertools.combinations(free, each - len(part))])
    for parts in itertools.product(*by_group):
        yield tuple(itertools.chain.from_iterable(parts))


def _eliminated(
    measured: Measured, experts: int, count: int, limits: Limits, start: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    kept = tuple(range(experts)) if start is None else start
    while len(kept) > count:
        candidates = [
            _without(kept, expert)
            for group in range(experts // limits.size)
            for expert in limits.removable(kept, group)
        ]
        costs = measured(candidates)
        kept = candidates[int(np.argmin(costs))]
    return kept


def _swapped(
    measured: Measured, kept: tuple[int, ...], experts: int, limits: Limits, most: int
) -> tuple[float, tuple[int, ...]]:
    """Return the end of swaps that each gain most, of up to ``most`` that are tried in a round."""
    error = measured([kept])[0]
    for _round in range(_ROUNDS):
        candidates = neighbours(measured, kept, experts, limits, most)
        if not candidates:
            break
        costs = measured(candidates)
        best = int(np.argmin(costs))
        if not costs[best] < error:
            break
        kept, error = candidates[best], costs[best]
    return error, kept


def neighbours(
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
    return [tuple(sorted((*_without(kept, gone), come))) for gone, come in pairs]


def _promising(
    measured: Measured, kept: tuple[int, ...], pairs: list[tuple[int, int]], most: int
) -> list[tuple[int, int]]:
    """Return the pairs of which the one is missed least, and the other would be welcome most, each on its own."""
    goers = sorted({gone for gone, _ in pairs})
    comers = sorted({come for _, come in pairs})
    missed = dict(zip(goers, measured([_without(kept, gone) for gone in goers]), strict=True))
    welcome = dict(zip(comers, measured([tuple(sorted((*kept, come))) for come in comers]), strict=True))
    return sorted(pairs, key=lambda pair: (missed[pair[0]] + welcome[pair[1]], pair))[:most]


def _without(kept: tuple[int, ...], expert: int) -> tuple[int, ...]:
    return tuple(each for each in kept if each != expert)
