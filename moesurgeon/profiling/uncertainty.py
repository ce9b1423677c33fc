"""How sure a profile is of an expert's score: standard errors over documents, and support.

Documents are what was sampled, so errors are clustered by them. A score is a ratio of sums over documents,
r = sum x / sum n (n: tokens of text, or tokens routed to the expert), and by linearisation

    var r = D / (D - 1) x sum (x - r n)^2 / (sum n)^2,

which needs only sums of x^2, x n and n^2, and those add up over runs (Cochran, Sampling Techniques, 6.4).

Legend: D documents, L mixture layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesurgeon.profiling.statistics import Array, Statistics

SUPPORT = 100
"""Routed tokens under which the mean of an expert says little: an expert that was hardly seen is not called cold."""


@dataclass(frozen=True)
class Estimate:
    """``value`` and its standard ``error`` [L, E]; the error is infinite where fewer than two documents count.

    ``unseen``: up to where the value may be where nothing was counted and no error can be computed.
    """

    value: Array
    error: Array
    unseen: float = 0.0


def per_token(statistics: Statistics, name: str, domain: str | None = None) -> Estimate:
    """Return the sum ``name`` per token of text, of one domain or of all."""
    return _ratio(statistics, name, "by_document", domain)


def per_routed_token(statistics: Statistics, name: str, domain: str | None = None) -> Estimate:
    """Return the mean of ``name`` over the tokens that were routed to the expert; 0 where there were none."""
    return _ratio(statistics, name, "by_tokens", domain)


def utilization(statistics: Statistics, domain: str | None = None) -> Estimate:
    """Return each expert's share of the routed tokens of its layer."""
    estimate, k = per_token(statistics, "tokens", domain), statistics.top_k
    return Estimate(estimate.value / k, estimate.error / k, estimate.unseen / k)


def interval(estimate: Estimate) -> tuple[Array, Array]:
    """Return the 95 % interval; from 0 on, since nothing that is counted here is negative.

    Of what was not met once in n tokens the share may still be 3 / n (the rule of three; Hanley and Lippman-Hand,
    JAMA 249, 1983).
    """
    low, high = np.maximum(estimate.value - 1.96 * estimate.error, 0.0), estimate.value + 1.96 * estimate.error
    return low, np.where(estimate.value == 0, np.maximum(high, estimate.unseen), high)


def has_support(statistics: Statistics) -> np.ndarray:
    """Tell for each expert [L, E] whether it was given enough tokens to be judged by their mean."""
    enough: np.ndarray = statistics.support() >= SUPPORT
    return enough


def _ratio(statistics: Statistics, name: str, product: str, domain: str | None) -> Estimate:
    chosen = slice(None) if domain is None else [statistics.domains.index(domain)]
    sums = statistics.sums
    x = statistics.by_domain(name)[chosen].sum(axis=0)
    xx = sums[f"{name}.squares"][chosen].sum(axis=0)
    xn = sums[f"{name}.{product}"][chosen].sum(axis=0)
    if product == "by_document":
        n, nn = statistics.seen[chosen].sum(), sums["documents.squares"][chosen].sum()
    else:
        n = statistics.by_domain("tokens")[chosen].sum(axis=0)
        nn = sums["tokens.squares"][chosen].sum(axis=0)
    count = float(sums["documents"][chosen].sum())
    n, nn = np.broadcast_to(n, x.shape), np.broadcast_to(nn, x.shape)
    value = np.divide(x, n, out=np.zeros_like(x), where=n > 0)
    spread = np.maximum(xx - 2 * value * xn + value**2 * nn, 0.0)
    error = np.full_like(x, np.inf)
    if count > 1:
        # Where one document has all of n, whatever it says is the mean: no spread, and no certainty either.
        np.divide(np.sqrt(spread * count / (count - 1)), n, out=error, where=n**2 > nn * (1 + 1e-12))
    seen, weights = statistics.seen[chosen], np.array(statistics.weights or (1.0,) * len(statistics.domains))[chosen]
    effective = seen.sum() ** 2 / (weights @ seen) if seen.any() else 0.0  # tokens: twice the weight is not twice those
    return Estimate(value, error, float(3 / effective) if name == "tokens" and effective else 0.0)
