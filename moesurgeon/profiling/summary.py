"""A profile in figures: per layer who is used, how sure that is, and what looks wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesurgeon.profiling.statistics import (
    FACTORS,
    POSITIONS,
    SIZES,
    Array,
    Statistics,
    gini,
    normalised_entropy,
    shares,
    variation,
)
from moesurgeon.profiling.uncertainty import SUPPORT, interval, utilization

COLLAPSED = 0.8
"""Entropy of the utilisation, as a share of its largest, under which a layer counts as collapsed."""
NICHE = 2.0
"""An expert is a niche where some domain or position uses it so many times as often as all text does."""

_MEASURED = ("gate_mass", "reap", "first_choice", "router_entropy", "router_margin")  # not to be had from counts


def summary_of(statistics: Statistics) -> dict[str, Any]:
    """Return what ``profile --json`` reports of the sums.

    Layers: ``utilization`` with its 95 % ``interval`` over documents, ``entropy``, ``max_over_mean``,
    ``variation`` and ``gini`` of it, ``gate_mass`` and ``first_choice`` per token, ``reap``, the router's mean
    entropy (nats) and margin, ``never_routed``, ``low_support``, ``niches`` (expert, where, how many times as
    often), ``overflow`` by dispatch size and capacity factor for the gate as it is and for top-1. Of a server's
    counts what needs weights, outputs or positions is left out.
    """
    tokens = float(statistics.seen.sum())
    layers = {str(layer): _layer(statistics, row, tokens) for row, layer in enumerate(statistics.layers)}
    return {
        "tokens": int(tokens),
        "documents": int(statistics.sums["documents"].sum()),
        "domains": dict(zip(statistics.domains, map(int, statistics.seen), strict=True)),
        "counts_only": statistics.counts_only,
        "positions": {name: int(count) for name, count in _positions(statistics).items() if count},
        "layers": layers,
        "warnings": _warnings(layers),
    }


def bucket_name(number: int) -> str:
    """Return the name of a bucket of positions.

    >>> bucket_name(0), bucket_name(4)
    ('0-511', '32768-')
    """
    end = str(POSITIONS[number + 1] - 1) if number + 1 < len(POSITIONS) else ""
    return f"{POSITIONS[number]}-{end}"


def _layer(statistics: Statistics, row: int, tokens: float) -> dict[str, Any]:
    share = statistics.utilization()[row]
    low, high = interval(utilization(statistics))
    counts = statistics.total("tokens")[row]
    figures = {
        "utilization": share.tolist(),
        "interval": [[_finite(a), _finite(b)] for a, b in zip(low[row], high[row], strict=True)],
        "entropy": float(normalised_entropy(share)),
        "max_over_mean": float(share.max() * statistics.experts),
        "variation": float(variation(share)),
        "gini": float(gini(share)),
        "gate_mass": (statistics.total("weight")[row] / max(tokens, 1)).tolist(),
        "reap": _means(statistics.total("weighted_norm")[row], counts),
        "first_choice": (statistics.total("first_choice")[row] / max(tokens, 1)).tolist(),
        "router_entropy": float(statistics.total("entropy")[row] / max(tokens, 1)),
        "router_margin": float(statistics.total("margin")[row] / max(tokens, 1)),
        "never_routed": np.flatnonzero(counts == 0).tolist(),
        "low_support": np.flatnonzero((counts > 0) & (counts < SUPPORT)).tolist(),
        "niches": niches_of(statistics, row),
        "overflow": overflow_of(statistics, row),
    }
    return {name: figures[name] for name in figures if not (statistics.counts_only and name in _MEASURED)}


def niches_of(statistics: Statistics, row: int) -> list[dict[str, Any]]:
    """Return the experts of the layer in place ``row`` that some text uses far more than all text does.

    ``times``: how many times as often; only where the expert was given enough tokens of that text to tell.
    """
    overall = statistics.utilization()[row]
    found = []
    by_domain, by_position = (of("tokens")[:, row] for of in (statistics.by_domain, statistics.by_position))
    places = [
        *(("domain", name, counts) for name, counts in zip(statistics.domains, by_domain, strict=True)),
        *(("position", bucket_name(number), counts) for number, counts in enumerate(by_position)),
        ("first choice", "", statistics.total("first_choice")[row]),
    ]
    for kind, name, counts in places:
        times = shares(counts) / np.maximum(overall, 1e-12)
        for expert in np.flatnonzero((times >= NICHE) & (counts >= SUPPORT)):
            found.append({"expert": int(expert), "kind": kind, "where": name, "times": float(times[expert])})
    return sorted(found, key=lambda niche: (niche["expert"], niche["kind"], niche["where"]))


def overflow_of(statistics: Statistics, row: int) -> dict[str, Any]:
    """Return by dispatch size the share of choices that do not fit, by capacity factor, and what padding costs."""
    report: dict[str, Any] = {}
    for number, size in enumerate(SIZES):
        dispatch, capacity = statistics.sums["dispatch"][row, number], statistics.sums["capacity"][row, number]
        if dispatch[0, 0] == 0:
            continue
        report[str(size)] = {
            gate: {
                "dropped": {_named(c): _share(capacity[c, g, 1], capacity[c, g, 0]) for c in range(len(FACTORS))},
                "idle": {
                    _named(c): 1 - _share(capacity[c, g, 0] - capacity[c, g, 1], capacity[c, g, 2])
                    for c in range(len(FACTORS))
                },
                "max_over_mean": _share(dispatch[g, 1] * statistics.experts, dispatch[g, 3]),
                "padding_in_blocks": _share(dispatch[g, 2], dispatch[g, 3]) - 1,
            }
            for g, gate in enumerate(("as_is", "top_1"))
        }
    return report


def _warnings(layers: dict[str, Any]) -> list[str]:
    """Say what a cut should not be decided on, or the model not be served with, as it is."""
    warnings = []
    for layer, figures in layers.items():
        if figures["entropy"] < COLLAPSED:
            warnings.append(
                f"layer {layer} is collapsed: its utilisation has {figures['entropy']:.2f} of the entropy of even use, "
                f"the busiest expert {figures['max_over_mean']:.1f} x the mean"
            )
        if figures["never_routed"]:
            warnings.append(
                f"layer {layer}: {_listed(figures['never_routed'])} never routed to; that is not proof of no use"
            )
        if figures["low_support"]:
            warnings.append(
                f"layer {layer}: {_listed(figures['low_support'])} given under {SUPPORT} tokens; too few to judge"
            )
        cold = {niche["expert"] for niche in figures["niches"]}
        cold &= {e for e, share in enumerate(figures["utilization"]) if share < 0.5 / len(figures["utilization"])}
        if cold:
            warnings.append(f"layer {layer}: {_listed(sorted(cold))} cold on average, but hot for some text")
    return warnings


def _listed(experts: list[int]) -> str:
    few = ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
    return f"expert {few} was" if len(experts) == 1 else f"experts {few} were"


def _positions(statistics: Statistics) -> dict[str, float]:
    if statistics.counts_only:
        return {}
    return {bucket_name(number): float(count) for number, count in enumerate(statistics.sums["seen"].sum(axis=0))}


def _means(sums: Array, counts: Array) -> list[float | None]:
    """Divide, with None where there is nothing: never routed is not the same as zero."""
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def _named(factor: int) -> str:
    return f"{FACTORS[factor]:g}"


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
