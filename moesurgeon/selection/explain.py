"""Why each expert goes, from the profile alone: who used it, what the criterion says, and who is given its tokens.

Legend: T tokens, E experts, K experts per token, L mixture layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.profiling.statistics import Array, Statistics
from moesurgeon.profiling.uncertainty import has_support, interval, utilization

DESTINATIONS = 4
"""So many are listed; the rest is what is missing from a sum of one."""

Moved = Mapping[int, Array]
"""By layer [E, E]: the tokens that expert j is given now in the place of expert e."""


def explained(
    statistics: Statistics,
    weighted: Statistics,
    kept: Mapping[int, Sequence[int]],
    *,
    scores: Array | None = None,
    moved: Moved | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return by layer, for every expert that is not ``kept``, the one that goes first first:

    ``expert``; ``share`` of the layer's routed tokens with its 95 % ``interval``, as the choice weighs the text
    (``weighted``), and the same of each domain (``utilization``); the criterion's ``value`` and its ``rank`` in the
    layer, 1 for the first to go (None without ``scores`` [L, E]); whether it has ``support``; ``goes_to``, the experts
    that take its place with the share of its tokens, and of how many ``tokens`` that was counted (None without
    ``moved``, ``goes_to`` also where there were none); ``beside``, who was given its tokens together with it.
    """
    overall, bounds = weighted.utilization(), interval(utilization(weighted))
    by_domain = {
        name: (counts, interval(utilization(statistics, name)))
        for name, counts in zip(statistics.domains, _shares_by_domain(statistics), strict=True)
    }
    supported = has_support(weighted)
    ranks = None if scores is None else _ranks(scores)
    together = statistics.sums["together"]
    report: dict[str, list[dict[str, Any]]] = {}
    for row, layer in enumerate(statistics.layers):
        gone = [expert for expert in range(statistics.experts) if expert not in set(kept[layer])]
        entries = []
        for expert in gone:
            place = (row, expert)
            entry = {
                "expert": expert,
                "share": float(overall[place]),
                "interval": _bounds(bounds, place),
                "utilization": {
                    name: {"share": float(share[place]), "interval": _bounds(between, place)}
                    for name, (share, between) in by_domain.items()
                },
                "value": None if scores is None else float(scores[place]),
                "rank": None if ranks is None else int(ranks[place]),
                "support": bool(supported[place]),
                "goes_to": None,
                "tokens": None,
                "beside": _beside(together[row], expert, kept[layer]),
            }
            if moved is not None:
                to = moved[layer][expert]
                entry["tokens"] = round(float(to.sum()))
                entry["goes_to"] = _largest(to, float(to.sum())) if to.any() else None
            entries.append(entry)
        report[str(layer)] = sorted(entries, key=lambda entry: (entry["rank"] or 0, entry["expert"]))
    return report


def moved_tokens(before_TK: NDArray[np.int64], after_TK: NDArray[np.int64], experts: int) -> Array:
    """Return how many tokens each expert is given in the place of each other one [E, E].

    ``before_TK`` and ``after_TK``: who a token was and is given to. Where several of a token's experts leave, each
    leaves an equal part of its place to each that comes, so that the row of an expert adds up to the tokens that
    left it. (With routing groups an expert may leave that stays in the model: its group does not win any more.)
    """
    rows = np.arange(len(before_TK))[:, None]
    was, is_now = np.zeros((2, len(before_TK), experts), dtype=bool)
    was[rows, before_TK] = True
    is_now[rows, after_TK] = True
    left, came = was & ~is_now, is_now & ~was
    counts = np.maximum(came.sum(axis=1, keepdims=True), 1)
    result: Array = left.astype(np.float64).T @ (came / counts)
    return result


def _shares_by_domain(statistics: Statistics) -> Array:
    """Return each expert's share of a domain's routed tokens [D, L, E]; 0 where it has none."""
    tokens = statistics.by_domain("tokens")
    totals = tokens.sum(axis=2, keepdims=True)
    result: Array = np.divide(tokens, totals, out=np.zeros_like(tokens), where=totals > 0)
    return result


def _ranks(scores: Array) -> NDArray[np.int64]:
    """Return by layer 1 for the expert that goes first: the lowest score, of equal ones the higher number."""
    orders = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    result: NDArray[np.int64] = scores.shape[1] - orders
    return result


def _beside(together_EE: Array, expert: int, kept: Sequence[int]) -> list[dict[str, Any]]:
    """Return the kept experts that most of the tokens of ``expert`` were given to as well."""
    others = np.zeros(len(together_EE))
    others[list(kept)] = together_EE[expert, list(kept)]
    return _largest(others, float(together_EE[expert, expert]))


def _largest(counts: Array, total: float) -> list[dict[str, Any]]:
    order = np.argsort(-counts, kind="stable")[:DESTINATIONS]
    return [{"expert": int(other), "share": float(counts[other] / total)} for other in order if counts[other] > 0]


def _bounds(ends: tuple[Array, Array], place: tuple[int, int]) -> list[float | None]:
    return [float(end[place]) if np.isfinite(end[place]) else None for end in ends]
