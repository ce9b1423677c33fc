"""From sums per window to the figures that are reported, with intervals over documents."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.evaluation.measure import AGREEMENT, ESAP, KL, LOSS, TEACHER_LOSS, Measurement

_RESAMPLES = 1000
_SEED = 20251122
# Edges of the position buckets (0, 128, 256, 512, ... 8 Mi); long context is where rare experts live.
_EDGES = (0, *(1 << power for power in range(7, 24)))


def summarise(measured: Measurement) -> dict[str, Any]:
    """Return the report of an evaluation.

    ``loss`` is in nats per predicted token, weighted by tokens; ``interval`` is the 95 % bootstrap
    interval of the perplexity over documents (of the perplexity ratio under ``against``, paired).
    """
    everything = np.ones(len(measured.domain), dtype=bool)
    report: dict[str, Any] = {
        **_losses(measured, everything),
        "tokens_per_second": measured.tokens_per_second,
        "domains": {},
        "lengths": _lengths(measured),
    }
    for number, domain in enumerate(measured.domains):
        report["domains"][domain] = _losses(measured, measured.domain == number)
    if measured.has_teacher:
        report["against"] = _distance(measured, everything)
        report["against"]["domains"] = {
            domain: _distance(measured, measured.domain == number) for number, domain in enumerate(measured.domains)
        }
        rises = [measured.sums[measured.domain == n] for n in range(len(measured.domains))]
        rise = np.array([float((part[:, LOSS] - part[:, TEACHER_LOSS]).sum()) for part in rises])
        for domain, share in zip(measured.domains, _parts(rise), strict=True):
            report["against"]["domains"][domain]["share_of_rise"] = share
    return report


def _losses(measured: Measurement, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    sums, counts = _by_document(measured, chosen)
    loss = float(sums[:, LOSS].sum() / counts.sum())
    low, high = bootstrap(sums[:, LOSS], counts)
    return {
        "tokens": int(counts.sum()),
        "documents": len(counts),
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "interval": [float(np.exp(low)), float(np.exp(high))],
    }


def _distance(measured: Measurement, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    sums, counts = _by_document(measured, chosen)
    total = counts.sum()
    rises = sums[:, LOSS] - sums[:, TEACHER_LOSS]
    low, high = bootstrap(rises, counts)
    return {
        "loss": float(sums[:, TEACHER_LOSS].sum() / total),
        "kl": float(sums[:, KL].sum() / total),
        "agreement": float(sums[:, AGREEMENT].sum() / total),
        "esap": float(sums[:, ESAP].sum() / total),
        "perplexity_ratio": float(np.exp(rises.sum() / total)),
        "interval": [float(np.exp(low)), float(np.exp(high))],
    }


def bootstrap(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of ``sum(sums) / sum(counts)`` over resampled documents.

    Documents, not tokens, are what was sampled: tokens of one document resemble each other. With one
    document the interval is that one value.
    """
    rng = np.random.default_rng(_SEED)
    means = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        picked = rng.integers(0, len(counts), len(counts))
        means[number] = sums[picked].sum() / counts[picked].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _by_document(measured: Measurement, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Add up the windows of each document: sums [N, 5] and predicted tokens [N]."""
    keys = np.stack([measured.domain[chosen], measured.document[chosen]], axis=1)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    sums = np.zeros((place.max() + 1, measured.sums.shape[1]))
    counts = np.zeros(place.max() + 1)
    np.add.at(sums, place, measured.sums[chosen])
    np.add.at(counts, place, measured.positions[chosen])
    return sums, counts


def _lengths(measured: Measurement) -> dict[str, Any]:
    """Figures per bucket of positions in the window, named by first and last position."""
    report = {}
    for low, high in itertools.pairwise(_EDGES):
        part = measured.by_position[low:high].sum(axis=0)
        if part[-1] == 0:
            continue
        loss = float(part[LOSS] / part[-1])
        bucket: dict[str, Any] = {"tokens": int(part[-1]), "loss": loss, "perplexity": float(np.exp(loss))}
        if measured.has_teacher:
            bucket["perplexity_ratio"] = float(np.exp(loss - part[TEACHER_LOSS] / part[-1]))
        report[f"{low}-{high - 1}"] = bucket
    return report


def _parts(rise: NDArray[np.float64]) -> list[float | None]:
    """Divide the rise among the domains; None where there is no rise to divide."""
    total = float(rise.sum())
    return [float(part / total) if abs(total) > 1e-9 else None for part in rise]
