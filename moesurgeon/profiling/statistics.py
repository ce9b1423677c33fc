"""What a profile counts: float64 sums that add up over runs, and over the processes of one.

Legend: D domains, P buckets of positions, L mixture layers, E experts, K experts per token, F folds of
documents, B bins of a histogram, S sizes of a dispatch, C capacity factors, G gates (as it is, top-1).
All sums are over the tokens of a domain; w is the weight that the gate gave, f the expert's output before
weighting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

POSITIONS = (0, 512, 2048, 8192, 32768)
"""Where the buckets of positions in the window begin: long context apart, that is where rare experts live."""
FOLDS = 8
BINS = 16
SIZES = (512, 2048, 8192)
"""Tokens of a dispatch: what one rank routes at once."""
FACTORS = (1.0, 1.25, 1.5, 2.0)
"""Capacity factors."""
BLOCK_ROWS = 128  # of a grouped kernel: MegaBlocks pads every expert to whole blocks

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
CLUSTERED = ("tokens", "weight", "norm", "weighted_norm")
"""Of these there are sums over documents of squares and products, and sums by fold: what errors are made of."""

_AXES: Mapping[str, str] = {
    **dict.fromkeys((*PER_EXPERT, PEAK), "DPLE"),
    **dict.fromkeys(PER_LAYER, "DPL"),
    # Tokens by their router's entropy as a share of log E, and by their margin; bins from 0 to 1.
    "entropy_bins": "DLB",
    "margin_bins": "DLB",
    "ranks": "DLKE",  # tokens by the rank at which the expert was chosen
    "together": "LEE",  # tokens that were routed to both
    # Over documents with sums x, t tokens of text and n tokens routed to the expert: x^2, x t, x n.
    **{f"{name}.squares": "DLE" for name in CLUSTERED},
    **{f"{name}.by_document": "DLE" for name in CLUSTERED},
    **{f"{name}.by_tokens": "DLE" for name in CLUSTERED},
    **{f"{name}.folds": "DFLE" for name in CLUSTERED},
    "seen": "DP",  # tokens of text
    "seen.folds": "DF",
    "documents": "D",
    "documents.squares": "D",  # sum over documents of t^2
    # By size, capacity factor and gate: choices that were made, that did not fit, and places that there were.
    "capacity": "LSCGX",
    # By size and gate: dispatches, sum of the largest loads, rows in blocks of 128, choices.
    "dispatch": "LSGY",
}
_QUADRATIC = (".squares", ".by_document", ".by_tokens")  # of the sums over documents
_SIZES = {"P": len(POSITIONS), "F": FOLDS, "B": BINS, "S": len(SIZES), "C": len(FACTORS), "G": 2, "X": 3, "Y": 4}


@dataclass(frozen=True)
class Statistics:
    """Sums of a profile by name, with the axes of ``_AXES``."""

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    experts: int
    top_k: int
    sums: dict[str, Array]
    weights: tuple[float, ...] = ()
    """What the sums of each domain were multiplied by (``weighted``); empty where that is one."""

    @classmethod
    def empty(cls, domains: Iterable[str], layers: tuple[int, ...], experts: int, top_k: int) -> Statistics:
        """Return statistics of no tokens."""
        domains = tuple(domains)
        shapes = shapes_of(len(domains), len(layers), experts, top_k)
        return cls(domains, layers, experts, top_k, {name: np.zeros(shape) for name, shape in shapes.items()})

    @property
    def seen(self) -> Array:
        """Tokens of text by domain [D]."""
        seen: Array = self.sums["seen"].sum(axis=1)
        return seen

    @property
    def counts_only(self) -> bool:
        """Whether these are a server's counts of tokens, with nothing known of weights and outputs."""
        return bool(self.sums["tokens"].any()) and not self.sums["weight"].any()

    def total(self, name: str) -> Array:
        """Return the sum over domains and positions ([L, E] or [L]); of ``peak`` the largest."""
        return self._over(name, "DP")

    def by_domain(self, name: str) -> Array:
        """Return the sum over positions, by domain ([D, L, E] or [D, L]); of ``peak`` the largest."""
        return self._over(name, "P")

    def by_position(self, name: str) -> Array:
        """Return the sum over domains, by bucket of positions ([P, L, E] or [P, L]); of ``peak`` the largest."""
        return self._over(name, "D")

    def weighted(self, weights: Mapping[str, float]) -> Statistics:
        """Return the statistics in which a token of each domain counts ``weights`` times: what decisions are made on.

        Sums of squares and products over documents take the square of the weight, so that errors remain those of
        the weighted sums. Peaks, numbers of documents, and what has no domain (``together``, dispatches) stay.
        """
        assert not self.weights, "weighted once already"
        factors = tuple(float(weights.get(domain, 1.0)) for domain in self.domains)
        if set(factors) <= {1.0}:
            return self
        sums = {}
        for name, array in self.sums.items():
            stays = name in {PEAK, "documents"} or not _AXES[name].startswith("D")
            power = 0 if stays else 2 if name.endswith(_QUADRATIC) else 1
            sums[name] = array * np.array(factors).reshape(-1, *[1] * (array.ndim - 1)) ** power if power else array
        return Statistics(self.domains, self.layers, self.experts, self.top_k, sums, factors)

    def support(self) -> Array:
        """Return how many routed tokens each expert's mean rests on [L, E].

        With weights the effective number (sum w n)^2 / sum w^2 n: twice the weight is not twice the text.
        """
        tokens = self.by_domain("tokens")
        if not self.weights:
            return self.total("tokens")
        total, squared = tokens.sum(axis=0), np.tensordot(np.array(self.weights), tokens, axes=1)
        result: Array = np.divide(total**2, squared, out=np.zeros_like(total), where=squared > 0)
        return result

    def utilization(self) -> Array:
        """Return [L, E]: each expert's share of its layer's routed tokens; a layer adds up to 1."""
        return shares(self.total("tokens"))

    def merged(self, other: Statistics) -> Statistics:
        """Return the statistics of both texts; domains of the same name are added up.

        Documents count as different ones: a text that is in both is counted twice.
        """
        assert (self.layers, self.experts, self.top_k) == (other.layers, other.experts, other.top_k)
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        result = Statistics.empty(domains, self.layers, self.experts, self.top_k)
        for part in (self, other):
            where = [domains.index(domain) for domain in part.domains]
            for name, array in part.sums.items():
                target = result.sums[name]
                place = where if _AXES[name].startswith("D") else ...
                target[place] = np.maximum(target[place], array) if name == PEAK else target[place] + array
        return result

    def _over(self, name: str, axes: str) -> Array:
        array = self.sums[name]
        over = tuple(number for number, axis in enumerate(_AXES[name]) if axis in axes)
        result: Array = array.max(axis=over) if name == PEAK else array.sum(axis=over)
        return result


def shapes_of(domains: int, layers: int, experts: int, top_k: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of statistics."""
    sizes = {**_SIZES, "D": domains, "L": layers, "E": experts, "K": top_k}
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in _AXES.items()}


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


def variation(share: Array) -> Array:
    """Return the coefficient of variation over the last axis: standard deviation over mean; 0 for even shares."""
    result: Array = share.std(axis=-1) / share.mean(axis=-1)
    return result


def gini(share: Array) -> Array:
    """Return the Gini coefficient over the last axis: 0 for even shares, 1 - 1/E for a single one.

    >>> gini(np.array([0.25, 0.25, 0.25, 0.25])).item(), gini(np.array([1.0, 0.0, 0.0, 0.0])).item()
    (0.0, 0.75)
    """
    count = share.shape[-1]
    ranks = 2 * np.arange(1, count + 1) - count - 1
    result: Array = (np.sort(share, axis=-1) * ranks).sum(axis=-1) / (count * share.sum(axis=-1)) + 0.0
    return result


def capacities_of(choices: Array, experts: int, factor: float) -> Array:
    """Return the places of an expert for so many ``choices`` (DeepSpeed: at least 4).

    >>> capacities_of(np.array([8.0, 100.0]), 8, 1.25).tolist()
    [4.0, 16.0]
    """
    return np.maximum(np.ceil(choices / experts * factor), 4.0)
