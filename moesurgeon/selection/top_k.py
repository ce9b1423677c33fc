"""Experts per token, layer by layer: who would rather keep more of them, and how a budget is best divided.

Legend: L layers, K experts per token of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moesurgeon.errors import UsageError
from moesurgeon.selection.curves import BEARABLE

Array = NDArray[np.float64]

TIMES = 2.0
"""A layer would rather keep more experts per token if its error is over so many times that of the median layer."""


def rather_more(errors: Mapping[int, float]) -> list[int]:
    """Return the layers whose error is over :data:`TIMES` the median and no small one (``curves.BEARABLE``).

    Both: where all layers suffer alike none is different, and twice next to nothing is still next to nothing.

    >>> rather_more({0: 0.1, 1: 0.12, 2: 0.5}), rather_more({0: 0.001, 1: 0.002, 2: 0.03})
    ([2], [])
    """
    limit = max(BEARABLE, TIMES * float(np.median(list(errors.values()))))
    return [layer for layer, error in errors.items() if error > limit]


def divided(errors_LK: Array, average: float) -> list[int]:
    """Return the experts per token of each layer, 1 to K, that add up to the least error under ``average`` of them.

    ``errors_LK``: the error of each layer with each number of experts per token. Exact for errors of any shape, by
    dynamic programming: the least error of the first layers with so many experts in all, layer after layer. Of equal
    sums the one with fewer experts counts, then the one in which later layers have fewer. Raises UsageError for an
    average that no layer could have.

    >>> divided(np.array([[0.5, 0.0], [0.1, 0.0], [0.3, 0.0]]), 1.5)
    [2, 1, 1]
    """
    layers, most = errors_LK.shape
    if not 1 <= average <= most:
        raise UsageError(f"{average:g} experts per token on average is not between 1 and the checkpoint's {most}")
    # Beyond one for each; the fraction of an expert that an average of decimals is short of by rounding is one.
    spare = int(np.floor((average - 1) * layers + 1e-9))
    best = np.zeros(spare + 1)  # of the layers so far, by how many experts beyond one for each they have at most
    taken = np.zeros((layers, spare + 1), dtype=int)
    for layer, errors_K in enumerate(errors_LK):
        candidates = np.full((most, spare + 1), np.inf)
        for more in range(min(most, spare + 1)):
            candidates[more, more:] = best[: spare + 1 - more] + errors_K[more]
        taken[layer] = candidates.argmin(axis=0)  # the first of equals: fewer
        best = candidates.min(axis=0)
    left, counts = int(best.argmin()), [0] * layers
    for layer in reversed(range(layers)):
        counts[layer] = 1 + int(taken[layer, left])
        left -= counts[layer] - 1
    return counts
