"""Milliseconds for any number of tokens, from measurements at a few: a line in pieces that never falls.

Legend: P points that were measured, K knots of the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_KNOTS = 6
_CLOSE = 0.03  # of a point's own value: closer than this to all points, a knot less is no loss


@dataclass(frozen=True)
class Curve:
    """Straight between ``tokens`` [K] with ``milliseconds`` [K], on in the last direction beyond them; 0 at 0."""

    tokens: tuple[float, ...]
    milliseconds: tuple[float, ...]

    def __call__(self, tokens: Array | float) -> Array:
        """Return milliseconds for each number of tokens.

        >>> Curve((1.0, 10.0), (2.0, 20.0))([0.0, 0.5, 1.0, 5.5, 20.0]).tolist()
        [0.0, 1.0, 2.0, 11.0, 40.0]
        """
        x, at = np.asarray(tokens, dtype=np.float64), np.array((0.0, *self.tokens))
        y = np.array((0.0, *self.milliseconds))
        slope = (y[-1] - y[-2]) / (at[-1] - at[-2])
        result: Array = np.interp(x, at, y) + np.maximum(x - at[-1], 0.0) * slope
        return result

    @property
    def knots(self) -> list[list[float]]:
        """[tokens, milliseconds] of each knot."""
        return [list(pair) for pair in zip(self.tokens, self.milliseconds, strict=True)]


def fitted(tokens: Sequence[float], milliseconds: Sequence[float], most_knots: int = MOST_KNOTS) -> Curve:
    """Return a curve near the points: first made to rise, then knots left out as long as that costs little.

    ``tokens`` [P] ascend. What rises is the isotonic regression (Barlow et al., Statistical Inference under Order
    Restrictions, 1.2: pool adjacent violators) in relative error, since times lie decades apart. Of its points
    always that one goes next without which the largest relative error of all points is least, while there are
    more than ``most_knots`` or that error is under 3 %.
    """
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(milliseconds, dtype=np.float64)
    assert len(x) == len(y) > 0 and (np.diff(x) > 0).all() and (y > 0).all()
    rising = np.exp(isotonic(np.log(y)))
    knots = list(range(len(x)))
    while len(knots) > 2:
        worst = [_error(x, rising, knots[:at] + knots[at + 1 :]) for at in range(1, len(knots) - 1)]
        least = int(np.argmin(worst))
        if len(knots) <= most_knots and worst[least] > _CLOSE:
            break
        del knots[least + 1]
    return Curve(tuple(x[knots].tolist()), tuple(rising[knots].tolist()))


def isotonic(values: Array) -> Array:
    """Return the rising sequence nearest to ``values`` in squared error: adjacent violators take their mean.

    >>> isotonic(np.array([1.0, 3.0, 2.0, 4.0])).tolist()
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (low, n), (high, m) = pools[-2:]
            pools[-2:] = [((low * n + high * m) / (n + m), n + m)]
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


def _error(x: Array, y: Array, knots: list[int]) -> float:
    """Return the largest relative error of the points where only ``knots`` are kept."""
    return float(np.abs(np.interp(x, x[knots], y[knots]) / y - 1.0).max())
