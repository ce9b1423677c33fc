"""Would the choice stand on other text? What changes when half of the documents are left out.

The profile holds its sums by fold of documents, so that this needs no further run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from moesurgeon.profiling.statistics import CLUSTERED, FOLDS, Array, Statistics
from moesurgeon.profiling.uncertainty import Estimate, per_routed_token, per_token
from moesurgeon.selection.criteria import scores_of

_SETTLED = 0.10
"""Up to this share of changing drops a profile counts as long enough."""


@dataclass(frozen=True)
class Stability:
    """``changed``: the share of the dropped experts that half of the text would not drop, on average over halves
    in all layers, ``worst`` in ``worst_layer``; ``tokens``: about how much text would settle the choice (None: no
    amount that could be estimated).
    """

    changed: float
    worst: float
    worst_layer: int
    tokens: int | None

    @property
    def is_settled(self) -> bool:
        return self.changed <= _SETTLED

    def as_dict(self) -> dict[str, Any]:
        """Return what ``prune --json`` reports."""
        return {**asdict(self), "settled": self.is_settled}


def stability(
    statistics: Statistics,
    criterion: str,
    choose: Callable[[Array], Mapping[int, Sequence[int]]],
    fixed: Mapping[int, Collection[int]] = MappingProxyType({}),
) -> Stability | None:
    """Return how stable the choice by ``criterion`` is; None if there are too few documents.

    ``choose`` leads from scores [L, E] to the experts that stay, the ``fixed`` ones whatever they score.

    Of the 70 ways to halve the eight folds each counts once, except those that leave all of the text in one half.
    A seeded random choice does not depend on text.
    """
    seen = statistics.sums["seen.folds"].sum(axis=0)
    if criterion == "random" or (seen > 0).sum() < 2:
        return None
    chosen = choose(scores_of(statistics, criterion))
    halves = [
        choose(scores_of(_half(statistics, folds), criterion))
        for folds in itertools.combinations(range(FOLDS), FOLDS // 2)
        if 0 < seen[list(folds)].sum() < seen.sum()
    ]
    return changed_in(halves, chosen, statistics.experts, _tokens_needed(statistics, criterion, chosen, fixed))


def changed_in(
    halves: Sequence[Mapping[int, Sequence[int]]],
    chosen: Mapping[int, Sequence[int]],
    experts: int,
    tokens: int | None = None,
) -> Stability:
    """Return how much the choices of ``halves`` of the text differ from ``chosen``, all by layer."""
    layers = list(chosen)
    changes = [[len(set(half[layer]) - set(chosen[layer])) for layer in layers] for half in halves]
    dropped = np.array([experts - len(chosen[layer]) for layer in layers])
    changed = np.mean(changes, axis=0)
    by_layer = changed / np.maximum(1, dropped)
    worst = int(by_layer.argmax())
    return Stability(float(changed.sum() / max(1, dropped.sum())), float(by_layer[worst]), layers[worst], tokens)


def errors_of(statistics: Statistics, criterion: str) -> Estimate | None:
    """Return the scores of ``criterion`` (per token of text where they are sums) with their errors; None if random."""
    match criterion:
        case "frequency":
            return per_token(statistics, "tokens")
        case "gate":
            return per_token(statistics, "weight")
        case "ean":
            return per_token(statistics, "norm")
        case "traffic-reap":
            return per_token(statistics, "weighted_norm")
        case "man":
            return per_routed_token(statistics, "norm")
        case "reap":
            return per_routed_token(statistics, "weighted_norm")
    return None


def _half(statistics: Statistics, folds: tuple[int, ...]) -> Statistics:
    """Return the sums of the documents of ``folds``, as far as criteria need them."""
    part = Statistics.empty(("half",), statistics.layers, statistics.experts, statistics.top_k)
    for name in CLUSTERED:
        part.sums[name][0, 0] = statistics.sums[f"{name}.folds"][:, list(folds)].sum(axis=(0, 1))
    return part


def _tokens_needed(
    statistics: Statistics,
    criterion: str,
    chosen: Mapping[int, Sequence[int]],
    fixed: Mapping[int, Collection[int]],
) -> int | None:
    """Return about how many tokens tell the last that stays from the first that goes, in the median layer.

    Errors shrink with the root of the text: a gap g with error s needs (1.96 s / g)^2 times as much.
    """
    estimate = errors_of(statistics, criterion)
    assert estimate is not None
    ratios = []
    for row, layer in enumerate(statistics.layers):
        go = np.setdiff1d(np.arange(statistics.experts), chosen[layer])
        stay = np.array([expert for expert in chosen[layer] if expert not in fixed.get(layer, ())])
        if not len(go) or not len(stay):
            continue
        value, error = estimate.value[row], estimate.error[row]
        last, first = stay[value[stay].argmin()], go[value[go].argmax()]
        gap, spread = value[last] - value[first], np.hypot(error[last], error[first])
        ratios.append((1.96 * spread / gap) ** 2 if gap > 0 else np.inf)
    weights = np.array(statistics.weights or (1.0,) * len(statistics.domains))
    text = np.divide(statistics.seen, weights, out=np.zeros_like(weights), where=weights > 0).sum()
    needed = float(np.median(ratios)) * float(text) if ratios else np.inf
    return int(needed) if np.isfinite(needed) else None


def rank_agreement(one: Array, other: Array) -> float:
    """Return Spearman's rank correlation of two criteria's scores [L, E], averaged over layers."""
    correlations = []
    for left, right in zip(one, other, strict=True):
        a, b = (np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float) for values in (left, right))
        spread = a.std() * b.std()
        correlations.append(float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else 1.0)
    return float(np.mean(correlations))
