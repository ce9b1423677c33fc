"""A profile expert by expert: the rows of a layer's table, and those of a spreadsheet.

Legend: D domains, P buckets of positions, L mixture layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moesurgeon.profiling.statistics import PEAK, PER_EXPERT, Array, Statistics, shares
from moesurgeon.profiling.summary import bucket_name, niches_of
from moesurgeon.profiling.uncertainty import Estimate, interval, utilization

COLUMNS = (
    "domain", "position", "layer", "expert", *PER_EXPERT, PEAK, "share",
    "domain_share", "domain_low", "domain_high", "all_share", "all_low", "all_high",
)  # fmt: skip
"""``share``: of the layer's routed tokens of this domain and position; then of the whole domain and of all text, each
with its 95 % interval (empty where there are too few documents)."""


def spreadsheet(statistics: Statistics) -> Iterator[tuple[Any, ...]]:
    """Yield a row of ``COLUMNS`` for each domain, bucket of positions that has text, layer and expert."""
    everywhere = _bounds(utilization(statistics))
    for d, domain in enumerate(statistics.domains):
        of_domain = _bounds(utilization(statistics, domain))
        for p in np.flatnonzero(statistics.sums["seen"][d]):
            share_LE = shares(statistics.sums["tokens"][d, p])
            for row, layer in enumerate(statistics.layers):
                for expert in range(statistics.experts):
                    sums = [statistics.sums[name][d, p, row, expert] for name in (*PER_EXPERT, PEAK)]
                    bounds = [part[row, expert] for part in (*of_domain, *everywhere)]
                    figures = [_plain(value) for value in (*sums, share_LE[row, expert], *bounds)]
                    yield (domain, bucket_name(int(p)), layer, expert, *figures)


def experts_of(statistics: Statistics, layer: int) -> list[dict[str, Any]]:
    """Return what is known of each expert of ``layer``, the most used first.

    ``domains`` and ``positions``: its share of the routed tokens there; ``gate_mass`` and ``first_choice`` are per
    token of text, ``reap`` is the mean of w |f|; those three are None where only a server's counts are known.
    """
    row, text = statistics.layers.index(layer), max(float(statistics.seen.sum()), 1.0)
    value, low, high = (part[row] for part in _bounds(utilization(statistics)))
    tokens, pull = statistics.total("tokens")[row], statistics.total("weighted_norm")[row]
    mass, first = statistics.total("weight")[row] / text, statistics.total("first_choice")[row] / text
    by_domain = shares(statistics.by_domain("tokens")[:, row])
    by_position = shares(statistics.by_position("tokens")[:, row])
    with_text = np.flatnonzero(statistics.sums["seen"].sum(axis=0))
    niches = niches_of(statistics, row)
    known = not statistics.counts_only
    return [
        {
            "expert": int(expert),
            "tokens": _plain(tokens[expert]),
            "share": float(value[expert]),
            "interval": [_finite(low[expert]), _finite(high[expert])],
            "gate_mass": float(mass[expert]) if known else None,
            "first_choice": float(first[expert]) if known else None,
            "reap": float(pull[expert] / tokens[expert]) if known and tokens[expert] else None,
            "peak": float(statistics.total(PEAK)[row, expert]) if known else None,
            "domains": {name: float(by_domain[d, expert]) for d, name in enumerate(statistics.domains)},
            "positions": {bucket_name(int(p)): float(by_position[p, expert]) for p in with_text},
            "niches": [niche for niche in niches if niche["expert"] == expert],
        }
        for expert in np.argsort(-tokens, kind="stable")
    ]


def coldest(statistics: Statistics, layer: int, count: int = 3) -> list[dict[str, Any]]:
    """Return the ``count`` least used experts of ``layer``, the least first, and the domains they serve.

    ``serves``: the domain where its share is largest and that share; None where it was never routed to.
    """
    found = []
    for expert in experts_of(statistics, layer)[::-1][:count]:
        domain = max(expert["domains"], key=expert["domains"].__getitem__) if expert["tokens"] else None
        serves = None if domain is None else {"domain": domain, "share": expert["domains"][domain]}
        keys = ("expert", "tokens", "share", "interval", "niches")
        found.append({**{key: expert[key] for key in keys}, "serves": serves})
    return found


def _bounds(estimate: Estimate) -> tuple[Array, Array, Array]:
    return estimate.value, *interval(estimate)


def _plain(value: Any) -> Any:
    """Return counts as whole numbers, and nothing for what is not known."""
    value = float(value)
    if not np.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
