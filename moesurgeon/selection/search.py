"""The subset of a layer's experts that costs least, by any measure of a subset: all of them, or the best found.

Where there are few subsets each is measured. Above that experts go one after the other, always the one whose loss
costs least (backward elimination). Then those that went are taken back one at a time, if another is missed less,
until that gains nothing. Of routing groups each loses the same number. Nothing here knows what is measured.

Legend: S subsets, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moesurgeon.profiling.statistics import Array

Errors = Callable[[NDArray[np.bool_]], Array]
"""The cost [S] of keeping only the experts ``kept`` [S, E]; NaN counts as the worst."""

ENUMERATED = 4096
"""So many subsets are all measured."""
_BETTERED = 3  # ends of elimination and starts, the cheapest ones, from which others are taken back
_ROUNDS = 64  # of that at most; a few are usual


@runtime_checkable
class Removals(Protocol):
    """Errors that can tell at once what a subset costs without each of its experts."""

    def __call__(self, kept: NDArray[np.bool_], /) -> Array: ...

    def without_each(self, kept: NDArray[np.bool_], /) -> Array:
        """Return the cost of ``kept`` [E] without each of its experts [E]."""
        ...


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

    Of equal ones that with the lower numbers. ``starts``: choices of others, the best of which are bettered as well
    where not all are measured; the result costs no more than any of them. ``fixed`` must fit the groups.
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
    ends = [_eliminated(measured, tuple(range(experts)), count, limits)]
    ends += [tuple(sorted(start)) for start in starts if limits.allow(start, groups)]
    ends = list(dict.fromkeys(ends))
    cheapest = [end for _error, end in sorted(zip(measured(ends), ends, strict=True))[:_BETTERED]]
    error, kept = min(_bettered(measured, end, experts, limits) for end in cheapest)
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
        kept = _eliminated(measured, kept, len(kept) - groups, limits)
        curve.append((kept, measured([kept])[0]))
    return curve


class Measured:
    """Remembers what was measured, by the bits of those that are kept; :func:`search` takes one to leave it there."""

    def __init__(self, errors: Errors, experts: int) -> None:
        self._errors, self._experts = errors, experts
        self._known: dict[int, float] = {}

    @property
    def count(self) -> int:
        return len(self._known)

    def knows(self, subset: tuple[int, ...]) -> bool:
        return _bits(subset) in self._known

    def cheapest(self, size: int, limits: Limits, groups: int) -> list[tuple[int, ...]]:
        """Return what was measured of ``size`` experts within ``limits``, the cheapest first."""
        known = ((cost, self._subset(key)) for key, cost in self._known.items() if key.bit_count() == size)
        return [subset for _cost, subset in sorted(known) if limits.allow(subset, groups)]

    def __call__(self, subsets: Sequence[tuple[int, ...]]) -> list[float]:
        keys = [_bits(subset) for subset in subsets]
        new = {key: subset for key, subset in zip(keys, subsets, strict=True) if key not in self._known}
        if new:
            kept = np.zeros((len(new), self._experts), dtype=bool)
            for row, subset in enumerate(new.values()):
                kept[row, list(subset)] = True
            self._known.update(zip(new, _numbers(self._errors(kept)), strict=True))
        return [self._known[key] for key in keys]

    def _subset(self, key: int) -> tuple[int, ...]:
        return tuple(expert for expert in range(self._experts) if key >> expert & 1)

    def without(self, kept: tuple[int, ...], going: Sequence[int]) -> list[float]:
        """Return the cost of ``kept`` without each of ``going``."""
        if not isinstance(self._errors, Removals):
            return self([without(kept, expert) for expert in going])
        whole = _bits(kept)
        keys = [whole ^ (1 << expert) for expert in going]
        if not all(key in self._known for key in keys):
            mask = np.zeros(self._experts, dtype=bool)
            mask[list(kept)] = True
            found = _numbers(self._errors.without_each(mask))
            for key, expert in zip(keys, going, strict=True):
                self._known.setdefault(key, found[expert])
        return [self._known[key] for key in keys]


def _bits(kept: Sequence[int]) -> int:
    return sum(1 << expert for expert in kept)


def _numbers(errors: Array) -> list[float]:
    found: list[float] = np.nan_to_num(np.asarray(errors, dtype=np.float64), nan=np.inf, posinf=np.inf).tolist()
    return found


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


def _eliminated(measured: Measured, kept: tuple[int, ...], count: int, limits: Limits) -> tuple[int, ...]:
    """Return the ``count`` of ``kept`` that are left when always the one goes that is missed least."""
    groups = range(max(kept) // limits.size + 1)
    while len(kept) > count:
        going = [expert for group in groups for expert in limits.removable(kept, group)]
        kept = without(kept, going[int(np.argmin(measured.without(kept, going)))])
    return kept


def _bettered(measured: Measured, kept: tuple[int, ...], experts: int, limits: Limits) -> tuple[float, tuple[int, ...]]:
    """Return what is left, and its cost, when each that went is taken back where another is missed less."""
    error = measured([kept])[0]
    for _round in range(_ROUNDS):
        before = kept
        for back in range(experts):
            if back in kept:
                continue
            more = tuple(sorted((*kept, back)))
            going = [expert for expert in limits.removable(more, back // limits.size) if expert != back]
            costs = measured.without(more, going)
            if going and min(costs) < error:
                place = int(np.argmin(costs))
                kept, error = without(more, going[place]), costs[place]
        if kept == before:
            break
    return error, kept


def without(kept: tuple[int, ...], expert: int) -> tuple[int, ...]:
    return tuple(each for each in kept if each != expert)
