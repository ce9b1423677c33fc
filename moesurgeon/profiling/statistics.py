"""What a profile counts: float64 sums per domain, layer and expert, which add up over runs.

Legend: D domains, L mixture layers, E experts. All sums are over the tokens of a domain; w is the
weight that the gate gave, f the expert's output before weighting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PER_EXPERT = (
    "tokens",  # how many were routed to the expert
    "weight",  # sum of w
    "norm",  # sum of |f|
    "norm2",  # sum of |f|^2
    "weighted_norm",  # sum of w |f|
    "weighted_norm2",  # sum of (w |f|)^2
    "first_choice",  # how many a top-1 gate would route here
)
PEAK = "peak"  # largest w |f|
PER_LAYER = (
    "entropy",  # sum over tokens of the entropy of the router's distribution, in nats
    "margin",  # sum over tokens of the best score less the second best
)


@dataclass(frozen=True)
class Statistics:
    """Sums of a profile. ``seen`` [D]: tokens; ``sums``: [D, L, E] and [D, L] arrays by name."""

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    experts: int
    top_k: int
    seen: Array
    sums: dict[str, Array]

    @classmethod
    def empty(cls, domains: Iterable[str], layers: tuple[int, ...], experts: int, top_k: int) -> Statistics:
        """Return statistics of no tokens."""
        domains = tuple(domains)
        shape = (len(domains), len(layers), experts)
        sums = {name: np.zeros(shape) for name in (*PER_EXPERT, PEAK)}
        sums |= {name: np.zeros(shape[:2]) for name in PER_LAYER}
        return cls(domains, layers, experts, top_k, np.zeros(len(domains)), sums)

    def total(self, name: str) -> Array:
        """Return the sum over domains ([L, E] or [L]); of ``peak`` the largest."""
        array = self.sums[name]
        result: Array = array.max(axis=0) if name == PEAK else array.sum(axis=0)
        return result

    def utilization(self) -> Array:
        """Return [L, E]: each expert's share of its layer's routed tokens; a layer adds up to 1."""
        return shares(self.total("tokens"))

    def merged(self, other: Statistics) -> Statistics:
        """Return the statistics of both texts; domains of the same name are added up."""
        assert (self.layers, self.experts, self.top_k) == (other.layers, other.experts, other.top_k)
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        result = Statistics.empty(domains, self.layers, self.experts, self.top_k)
        for part in (self, other):
            where = [domains.index(domain) for domain in part.domains]
            result.seen[where] += part.seen
            for name, array in part.sums.items():
                if name == PEAK:
                    result.sums[name][where] = np.maximum(result.sums[name][where], array)
                else:
                    result.sums[name][where] += array
        return result


def shares(counts: Array) -> Array:
    """Divide by the sum of the last axis; even shares where nothing was counted."""
    totals = counts.sum(axis=-1, keepdims=True)
    even = np.full_like(counts, 1 / counts.shape[-1])
    return np.divide(counts, totals, out=even, where=totals > 0)


def normalised_entropy(share: Array) -> Array:
    """Return the entropy of shares over the last axis, 1 for even ones, 0 for a single one.

    >>> normalised_entropy(np.array([0.5, 0.5, 0.0, 0.0])).item()
    0.5
    """
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    # Adding 0.0 turns the -0.0 of a single share into 0.0.
    result: Array = -(share * logs).sum(axis=-1) / np.log(max(2, share.shape[-1])) + 0.0
    return result
