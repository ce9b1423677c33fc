"""Whether routing would collapse with fewer experts per token, from what was counted with more.

A top-1 gate takes each token's first choice, which is counted while profiling. Fewer than before but several take the
first so many ranks; that too is exact, as long as no bias takes part in the choice: then the order of the weights,
which ranks are counted by, is not that of the choice.

What is told is the traffic on the layer's inputs as they were; that other inputs come from the layers before it, which
route otherwise as well, is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesurgeon.profiling.statistics import Array, Statistics, normalised_entropy, shares
from moesurgeon.profiling.summary import COLLAPSED, overflow_of
from moesurgeon.profiling.uncertainty import SUPPORT

STARVED = 0.25
"""An expert that is given under this part of an even share of the tokens is starved."""


def loads_at(statistics: Statistics, top_k: int, *, has_bias: bool) -> Array | None:
    """Return how many tokens each expert would be given by a top-``top_k`` gate [L, E]; None where that is unknown.

    ``has_bias``: whether a bias takes part in the choice only.
    """
    if top_k == statistics.top_k:
        return statistics.total("tokens")
    if statistics.counts_only:
        return None
    if top_k == 1:
        return statistics.total("first_choice")
    if has_bias:
        return None
    by_rank: Array = statistics.sums["ranks"].sum(axis=0)[:, :top_k].sum(axis=1)
    return by_rank


def collapse_of(statistics: Statistics, top_k: int, *, has_bias: bool) -> dict[str, Any] | None:
    """Return by layer how even the traffic of a top-``top_k`` gate would be; None where the sums do not say.

    ``entropy`` (1: even) and ``max_over_mean`` of the experts' loads, and ``as_is``, what they are now; ``unused``,
    experts that would be given no token, ``starved``, those that would be given some, under :data:`STARVED` of an even
    share; ``overflow``, the share of choices that would not fit, by dispatch size and capacity factor, which is counted
    for the gate as it is and for top-1 (else None); whether the layer is ``collapsed``, as ``profile show`` has it.
    """
    loads = loads_at(statistics, top_k, has_bias=has_bias)
    if loads is None:
        return None
    now = statistics.utilization()
    counted = "top_1" if top_k == 1 else "as_is" if top_k == statistics.top_k else None
    found = {}
    for row, layer in enumerate(statistics.layers):
        share = shares(loads[row])
        figures = _evenness(share)
        found[str(layer)] = {
            **figures,
            "as_is": _evenness(now[row]),
            "collapsed": figures["entropy"] < COLLAPSED,
            "unused": np.flatnonzero(loads[row] == 0).tolist(),
            "starved": np.flatnonzero((loads[row] > 0) & (share * statistics.experts < STARVED)).tolist(),
            "overflow": counted
            and {size: gates[counted]["dropped"] for size, gates in overflow_of(statistics, row).items()},
        }
    return found


def collapse_warnings(statistics: Statistics, top_k: int, layers: Mapping[str, Any]) -> list[str]:
    """Say of the ``layers`` of :func:`collapse_of` which would be collapsed, and whom nobody would be given to."""
    warnings = [
        f"layer {layer} would be collapsed: top-{top_k} has {figures['entropy']:.2f} of the entropy of even use there "
        f"({figures['as_is']['entropy']:.2f} as it is), the busiest expert {figures['max_over_mean']:.1f} x the mean"
        for layer, figures in layers.items()
        if figures["collapsed"]
    ]
    unused = {layer: figures["unused"] for layer, figures in layers.items() if figures["unused"]}
    if unused:
        places = [f"layer {layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in unused.items()]
        count = sum(map(len, unused.values()))
        warnings.append(
            f"{count} expert{'' if count == 1 else 's'} would be given no token by top-{top_k} "
            f"({'; '.join(places[:6])}{'; ...' if len(places) > 6 else ''})"
        )
    fair = float(statistics.seen.sum()) * top_k / statistics.experts
    if fair < SUPPORT:
        warnings.append(
            f"an even share of the profile's tokens is {fair:.0f} for each expert, under {SUPPORT}: too few to tell "
            "who would be starved; profile more text"
        )
    return warnings


def _evenness(share: Array) -> dict[str, float]:
    return {"entropy": float(normalised_entropy(share)), "max_over_mean": float(share.max() * len(share))}
