"""Two profiles side by side: whose traffic changed, by how much, and whether that is more than chance.

Legend: L mixture layers, E experts of the earlier profile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.profiling.statistics import Array, Statistics, normalised_entropy, shares
from moesurgeon.profiling.uncertainty import Estimate, utilization

LEVEL = 0.05
"""The share of false ones among the changes called significant."""


def difference(before: Statistics, after: Statistics, kept: Mapping[int, Sequence[int]] | None) -> dict[str, Any]:
    """Return what changed from ``before`` to ``after``, by the expert numbers of ``before``.

    ``kept``: by layer the old number of each expert of ``after``, None where they are the same. Shares are of a
    layer's routed tokens. Layers: ``entropy`` and ``max_over_mean`` [before, after], ``total_variation`` (half of the
    sum of absolute changes: the share of traffic that moved) of all text and by domain that both have, and
    ``experts``, the largest change first: ``expert``, ``after`` (its number now; None: dropped), ``share`` [before,
    after], ``change`` with its standard ``error``, and whether it is ``significant``.
    """
    assert before.layers == after.layers
    one, other = utilization(before), _renumbered(utilization(after), before, kept)
    # Shares of the layer: of a server's counts the layers need not add up to the same.
    old, new = before.utilization(), _spread(after.utilization(), before, kept)
    error = np.hypot(one.error, other.error)
    chance = _chance(new - old, error)
    # An expert that was dropped has no traffic for certain: no test is needed, and none is counted.
    stayed = _spread(np.ones_like(after.utilization()), before, kept) > 0
    significant = np.zeros_like(stayed)
    significant[stayed] = discoveries(chance[stayed])
    domains = [domain for domain in before.domains if domain in after.domains]
    layers = {}
    for row, layer in enumerate(before.layers):
        numbers = _numbers(layer, before, kept)
        change = new[row] - old[row]
        layers[str(layer)] = {
            "entropy": [float(normalised_entropy(of.utilization()[row])) for of in (before, after)],
            "max_over_mean": [float(of.utilization()[row].max() * of.experts) for of in (before, after)],
            "total_variation": float(np.abs(change).sum() / 2),
            "domains": {name: _variation_of(name, row, before, after, kept) for name in domains},
            "experts": [
                {
                    "expert": int(expert),
                    "after": numbers.get(int(expert)),
                    "share": [float(old[row, expert]), float(new[row, expert])],
                    "change": float(change[expert]),
                    "error": float(error[row, expert]) if np.isfinite(error[row, expert]) else None,
                    "significant": bool(significant[row, expert]),
                }
                for expert in np.argsort(-np.abs(change), kind="stable")
            ],
        }
    return {"layers": layers, "significant": int(significant.sum()), "compared": int(stayed.sum())}


def discoveries(chance: Array, level: float = LEVEL) -> NDArray[np.bool_]:
    """Tell which of the probabilities ``chance`` [N] are discoveries, ``level`` of which are false on average.

    Benjamini and Hochberg, J. R. Stat. Soc. B 57 (1995): the largest i with p_(i) <= i / N x level, and all below.

    >>> discoveries(np.array([0.001, 0.8, 0.02, 0.04])).tolist()
    [True, False, True, False]
    """
    ordered = np.sort(chance)
    passed = np.flatnonzero(ordered <= np.arange(1, len(chance) + 1) / max(1, len(chance)) * level)
    result: NDArray[np.bool_] = chance <= (ordered[passed[-1]] if len(passed) else -1.0)
    return result


def _chance(change: Array, error: Array) -> Array:
    """Return the probability of a change at least as large, in either direction, if there is none in truth."""
    ratio = np.divide(np.abs(change), error, out=np.zeros_like(change), where=(error > 0) & np.isfinite(error))
    ratio[(error == 0) & (change != 0)] = np.inf
    values = np.array([math.erfc(value / math.sqrt(2)) for value in ratio.flatten()])
    result: Array = values.reshape(ratio.shape)
    return result


def _variation_of(
    domain: str, row: int, before: Statistics, after: Statistics, kept: Mapping[int, Sequence[int]] | None
) -> float:
    old = shares(before.by_domain("tokens")[before.domains.index(domain), row])
    new = shares(after.by_domain("tokens")[after.domains.index(domain)])
    return float(np.abs(_spread(new, before, kept)[row] - old).sum() / 2)


def _renumbered(estimate: Estimate, before: Statistics, kept: Mapping[int, Sequence[int]] | None) -> Estimate:
    return Estimate(_spread(estimate.value, before, kept), _spread(estimate.error, before, kept))


def _spread(values: Array, before: Statistics, kept: Mapping[int, Sequence[int]] | None) -> Array:
    """Put values [L, E'] of the experts that are left at their old numbers [L, E]; 0 for the others."""
    result = np.zeros((len(before.layers), before.experts))
    for row, layer in enumerate(before.layers):
        result[row, list(_numbers(layer, before, kept))] = values[row]
    return result


def _numbers(layer: int, before: Statistics, kept: Mapping[int, Sequence[int]] | None) -> dict[int, int]:
    """Return the new number by the old one, in the order of the new ones."""
    return {old: new for new, old in enumerate(range(before.experts) if kept is None else kept[layer])}
