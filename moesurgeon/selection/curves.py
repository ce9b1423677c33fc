"""The error of a layer against how many of its experts stay: where a model can be pruned at all.

Experts go one after the other, always the one that is missed least, so the choices are nested and the curve costs no
more than one elimination. What a search finds for a single count is as good or better.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moesurgeon.selection.search import Errors, nested

BEARABLE = 0.05
"""Up to this share of |y|^2 the error of a layer is called small."""


def curve_of(
    errors: Errors, experts: int, least: int, *, groups: int = 1, fixed: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Return the points of a layer's curve from all ``experts`` down to ``least``: ``experts``, ``error``, ``kept``."""
    points = nested(errors, experts, least, groups=groups, fixed=fixed)
    return [{"experts": len(kept), "error": error, "kept": list(kept)} for kept, error in points]


def fewest(points: Sequence[Mapping[str, Any]], bearable: float = BEARABLE) -> int:
    """Return the fewest experts before the error is over ``bearable`` for the first time.

    >>> fewest([{"experts": 8, "error": 0.0}, {"experts": 7, "error": 0.02}, {"experts": 6, "error": 0.3}])
    7
    """
    count = int(points[0]["experts"])
    for point in points:
        if point["error"] > bearable:
            break
        count = int(point["experts"])
    return count


def columns(counts: Sequence[int], most: int = 8) -> list[int]:
    """Return up to ``most`` of the ``counts``, the first and the last among them, evenly spaced.

    >>> columns([8, 7, 6]), columns(list(range(64, 5, -1)), 4)
    ([8, 7, 6], [64, 45, 25, 6])
    """
    if len(counts) <= most:
        return list(counts)
    return [counts[round(place * (len(counts) - 1) / (most - 1))] for place in range(most)]
