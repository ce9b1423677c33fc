"""What a profile says of latency: measured curves, and what they make of the loads that were seen.

Legend: L mixture layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moesurgeon.profiling.curve import Curve
from moesurgeon.profiling.statistics import SIZES, Statistics

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def curve_of(latency: Mapping[str, Any]) -> Curve:
    """Return the curve whose knots ``latency`` has."""
    tokens, milliseconds = zip(*latency["knots"], strict=True)
    return Curve(tokens, milliseconds)


def latency_summary(latency: Mapping[str, Any], statistics: Statistics) -> dict[str, Any]:
    """Return ``latency`` with ``experts``: by layer and size of a dispatch the milliseconds of each expert.

    ``milliseconds`` [E] for the expert's mean load in a dispatch, ``straggler_ms`` for the mean of the largest
    loads, ``even_ms`` for a load that all would have alike: what a rank with one expert takes, and could take.
    """
    curve, share = curve_of(latency), statistics.utilization()
    layers: dict[str, Any] = {}
    for row, layer in enumerate(statistics.layers):
        sizes: dict[str, Any] = {}
        for number, size in enumerate(SIZES):
            dispatches, largest, _, choices = statistics.sums["dispatch"][row, number, 0]
            if dispatches:
                sizes[str(size)] = {
                    "milliseconds": curve(share[row] * choices / dispatches).tolist(),
                    "straggler_ms": float(curve(largest / dispatches)),
                    "even_ms": float(curve(choices / dispatches / statistics.experts)),
                }
        layers[str(layer)] = sizes
    return {**latency, "experts": layers}


def merged_latency(
    first: Mapping[str, Any] | None, second: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, str | None]:
    """Return the latency of a merged profile and, if something was lost, a line that says so.

    Times are not added up: the first one's count where both are of one device and dtype, or only one has any.
    """
    if first is None or second is None:
        return first or second, None
    if (first["device"], first["dtype"]) == (second["device"], second["dtype"]):
        return first, None
    kinds = " and ".join(f"{each['device']} {each['dtype']}" for each in (first, second))
    return None, f"latency was measured on {kinds}: the merged profile has none, measure it again with --latency"


def checked_latency(said: Any, layers: Sequence[int]) -> Mapping[str, Any] | None:
    """Return what profile.json says of latency; ValueError, KeyError or TypeError if it makes no sense."""
    if said is None:
        return None
    columns = [np.asarray(said[name], dtype=np.float64) for name in ("tokens", *QUANTILES)]
    knots = np.asarray(said["knots"], dtype=np.float64)
    if any(each.shape != columns[0].shape or each.ndim != 1 for each in columns) or knots.ndim != 2:
        raise ValueError("latency")
    if knots.shape[1] != 2 or not (np.diff(knots, axis=0) >= 0).all() or not (np.diff(knots[:, 0]) > 0).all():
        raise ValueError("latency: knots")
    if not all(np.isfinite(each).all() and (each > 0).all() for each in (*columns, knots)):
        raise ValueError("latency: no times")
    if not set(said["block"]) <= set(map(str, layers)):
        raise ValueError("latency: layers")
    for times in said["block"].values():
        if not all(np.isfinite(float(times[name])) for name in ("measured_ms", "predicted_ms")):
            raise ValueError("latency: no times")
    return dict(said)
