"""Which experts a share of the traffic calls cold, what the criteria say of them, and which of them are niches.

The rule of thumb removes experts that get less than 0.5 to 1 % of the tokens over long windows. Stock runtimes hold
one count for the whole model, so what can be removed is the number that the rule finds in every layer.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.errors import NothingToDo
from moesurgeon.profiling.statistics import Array, Statistics
from moesurgeon.profiling.summary import niches_of
from moesurgeon.profiling.uncertainty import has_support, interval, per_token
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import COUNTING, CRITERIA, scores_of
from moesurgeon.selection.stability import rank_agreement


def candidates(
    statistics: Statistics, below: float, groups: int = 1, spared: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Return what the rule finds: by layer the cold experts, and how the criteria agree on as many of them.

    An expert is cold where its share of the tokens is under ``below``, ``sure`` where the upper end of its 95 %
    ``interval`` is as well; ``ranks`` by criterion, 1 for the first that it would drop. ``count``: how many the rule
    would remove from every layer, ``spared`` [L, E] (``protected`` in the report) apart.
    """
    share, (low, high) = share_of_tokens(statistics), interval(per_token(statistics, "tokens"))
    supported = has_support(statistics)
    scores = {name: scores_of(statistics, name) for name in _compared(statistics)}
    # As the choice sorts: of equal scores the lower number stays.
    orders = {name: np.argsort(np.argsort(-of, axis=1, kind="stable"), axis=1) for name, of in scores.items()}
    layers = {}
    for row, layer in enumerate(statistics.layers):
        niches = niches_of(statistics, row)
        layers[str(layer)] = [
            {
                "expert": int(expert),
                "share": float(share[row, expert]),
                "interval": [float(end) if np.isfinite(end) else None for end in (low[row, expert], high[row, expert])],
                "sure": bool(high[row, expert] < below),
                "supported": bool(supported[row, expert]),
                "protected": spared is not None and bool(spared[row, expert]),
                "niches": [niche for niche in niches if niche["expert"] == expert],
                "ranks": {name: statistics.experts - int(order[row, expert]) for name, order in orders.items()},
            }
            for expert in np.flatnonzero(share[row] < below)
        ]
    count = count_below(statistics, below, groups, spared)
    report: dict[str, Any] = {"below": below, "count": count, "layers": layers}
    if 0 < count < statistics.experts:
        report["agreement"] = _agreement(statistics, scores, statistics.experts - count, groups)
    return report


def share_of_tokens(statistics: Statistics) -> Array:
    """Return each expert's share of the tokens of its layer [L, E]: k times its share of what was routed."""
    return statistics.utilization() * statistics.top_k


def cold_experts(statistics: Statistics, below: float, spared: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Tell who gets under a share of ``below`` [L, E] and is not ``spared``."""
    cold: NDArray[np.bool_] = share_of_tokens(statistics) < below
    return cold if spared is None else cold & ~spared


def count_below(statistics: Statistics, below: float, groups: int = 1, spared: NDArray[np.bool_] | None = None) -> int:
    """Return how many experts under a share of ``below`` every layer has (with groups: every group)."""
    cold = cold_experts(statistics, below, spared)
    by_group = cold.reshape(len(statistics.layers), groups, -1).sum(axis=2)
    return int(by_group.min()) * groups


def keep_above(
    statistics: Statistics, below: float, least: int, groups: int = 1, spared: NDArray[np.bool_] | None = None
) -> int:
    """Return how many experts stay, ``least`` at least, when the rule is applied; NothingToDo if all would."""
    count = max(statistics.experts - count_below(statistics, below, groups, spared), least)
    if count == statistics.experts:
        cold = cold_experts(statistics, below, spared).sum(axis=1)
        row = int(cold.argmin())
        raise NothingToDo(
            f"nothing to prune: layer {statistics.layers[row]} has {int(cold[row])} experts under a share of "
            f"{below:g}{'' if spared is None else ' that are not protected'}; every layer"
            f"{' and routing group' if groups > 1 else ''} has to lose the same number and keep {least} at least; "
            "raise --below, or give --keep; --dry-run lists what is cold"
        )
    return count


def _compared(statistics: Statistics) -> tuple[str, ...]:
    return tuple(
        name for name in CRITERIA if name != "random" and (name in COUNTING or not statistics.counts_only)
    )  # fmt: skip


def _agreement(statistics: Statistics, scores: dict[str, Array], keep: int, groups: int) -> list[dict[str, Any]]:
    """Return for each pair of criteria their rank correlation and the overlap of what they would drop."""
    chosen = {name: best(of, statistics.layers, keep, groups) for name, of in scores.items()}
    dropped = statistics.experts - keep
    pairs = []
    for one, other in itertools.combinations(scores, 2):
        both = [
            statistics.experts - len(set(chosen[one][layer]) | set(chosen[other][layer])) for layer in statistics.layers
        ]
        pairs.append(
            {
                "criteria": [one, other],
                "rank_correlation": rank_agreement(scores[one], scores[other]),
                "overlap": float(np.mean(both)) / dropped,
            }
        )
    return pairs
