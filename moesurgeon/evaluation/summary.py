"""From sums per window to the figures that are reported, with intervals over documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.evaluation.measure import AGREEMENT, EDGES, ESAP, KL, LOSS, TEACHER_LOSS, Measurement
from moesurgeon.traces.windows import Window

_RESAMPLES = 1000
_SEED = 20251122


def summarise(measured: Measurement) -> dict[str, Any]:
    """Return the report of an evaluation.

    ``loss`` is in nats per predicted token, weighted by tokens; ``interval`` is the 95 % bootstrap
    interval of the perplexity over documents (of the perplexity ratio under ``against``, paired), two times None
    where all of the text is one document.
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


def possible_report(domains: Sequence[str], *, length: int, has_teacher: bool) -> dict[str, Any]:
    """Return a report with every figure that one on text of these ``domains`` can have; the values say nothing."""
    buckets = np.zeros((len(domains), sum(edge < length - 1 for edge in EDGES), 6))
    buckets[..., -1] = 1
    number = np.arange(len(domains))
    return summarise(Measurement(tuple(domains), number, number, buckets, 1.0, 1, has_teacher))


def expected_report(windows: Sequence[Window], domains: Sequence[str], *, has_teacher: bool) -> dict[str, Any]:
    """Return a report with every figure that one on these ``windows`` will have; the values say nothing.

    A figure that is None here for lack of documents will be None in the report.
    """
    longest = max(len(window.tokens) for window in windows)
    edges = [*(edge for edge in EDGES if edge < longest - 1), longest - 1]
    buckets = np.zeros((len(windows), len(edges) - 1, 6))
    for row, window in zip(buckets, windows, strict=True):
        row[:, -1] = np.diff(np.minimum(edges, len(window.tokens) - 1))
    rows = [(domains.index(window.domain), window.document) for window in windows]
    domain, document = np.array(rows, dtype=np.int64).T
    return summarise(Measurement(tuple(domains), domain, document, buckets, 1.0, 1, has_teacher))


def _losses(measured: Measurement, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    sums, counts = _by_document(measured, measured.sums[chosen], measured.positions[chosen], chosen)
    loss = float(sums[:, LOSS].sum() / counts.sum())
    return {
        "tokens": int(counts.sum()),
        "documents": len(counts),
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "interval": _interval(sums[:, LOSS], counts),
    }


def _distance(measured: Measurement, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    sums, counts = _by_document(measured, measured.sums[chosen], measured.positions[chosen], chosen)
    total = counts.sum()
    return {
        "loss": float(sums[:, TEACHER_LOSS].sum() / total),
        "kl": float(sums[:, KL].sum() / total),
        "agreement": float(sums[:, AGREEMENT].sum() / total),
        "esap": float(sums[:, ESAP].sum() / total),
        **_ratio(sums, counts),
    }


def _lengths(measured: Measurement) -> dict[str, Any]:
    """Figures per bucket of positions in the window, named by first and last position."""
    report: dict[str, dict[str, Any]] = {}
    for number, (low, high) in enumerate(itertools.pairwise(EDGES)):
        if number >= measured.buckets.shape[1]:
            break
        bucket = measured.buckets[:, number]
        reached = bucket[:, -1] > 0
        if not reached.any():
            continue
        sums, counts = _by_document(measured, bucket[reached], bucket[reached, -1], reached)
        loss = float(sums[:, LOSS].sum() / counts.sum())
        name = f"{low}-{high - 1}"
        report[name] = {
            "tokens": int(counts.sum()),
            "documents": len(counts),
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "interval": _interval(sums[:, LOSS], counts),
        }
        if measured.has_teacher:
            ratio = _ratio(sums, counts)
            report[name] |= {"perplexity_ratio": ratio["perplexity_ratio"], "ratio_interval": ratio["interval"]}
    return report


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> dict[str, Any]:
    rises = sums[:, LOSS] - sums[:, TEACHER_LOSS]
    return {"perplexity_ratio": float(np.exp(rises.sum() / counts.sum())), "interval": _interval(rises, counts)}


def _interval(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> list[float] | list[None]:
    found = bootstrap(sums, counts)
    return [None, None] if found is None else [float(np.exp(bound)) for bound in found]


def bootstrap(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of ``sum(sums) / sum(counts)`` over resampled documents.

    Documents, not tokens, are what was sampled: tokens of one document resemble each other. None for one
    document, which does not tell how much documents differ.
    """
    if len(counts) < 2:
        return None
    rng = np.random.default_rng(_SEED)
    means = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        picked = rng.integers(0, len(counts), len(counts))
        means[number] = sums[picked].sum() / counts[picked].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _by_document(
    measured: Measurement, values: NDArray[np.float64], positions: NDArray[np.float64], chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Add up the ``chosen`` windows of each document: their values [N, C] and predicted tokens [N]."""
    keys = np.stack([measured.domain[chosen], measured.document[chosen]], axis=1)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    sums = np.zeros((place.max() + 1, values.shape[1]))
    counts = np.zeros(place.max() + 1)
    np.add.at(sums, place, values)
    np.add.at(counts, place, positions)
    return sums, counts


def _parts(rise: NDArray[np.float64]) -> list[float | None]:
    """Divide the rise among the domains; None where there is no rise to divide."""
    total = float(rise.sum())
    return [float(part / total) if abs(total) > 1e-9 else None for part in rise]
