"""How much of the loss gap to the teacher was closed, by domain, with intervals over documents."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.evaluation.measure import Measurement
from moesurgeon.evaluation.summary import bootstrap

Sums = NDArray[np.float64]
"""Losses summed over each window [W], in nats."""


def closed(like: Measurement, before: Sums, after: Sums, teacher: Sums) -> dict[str, Any]:
    """Return ``gap_closed`` = (before - after) / (before - teacher) with its ``interval``, of all text and by domain.

    The interval is the 95 % bootstrap interval over documents, paired: of each resample the sum of the gains by the
    sum of the gaps. None of one document, where there is no gap to close, and where its own reaches down to none.
    """
    everything = np.ones(len(like.domain), dtype=bool)
    report = _closed(like, everything, before, after, teacher)
    report["domains"] = {
        domain: _closed(like, like.domain == number, before, after, teacher)
        for number, domain in enumerate(like.domains)
        if (like.domain == number).any()
    }
    return report


def _closed(like: Measurement, chosen: NDArray[np.bool_], before: Sums, after: Sums, teacher: Sums) -> dict[str, Any]:
    keys = np.stack([like.domain[chosen], like.document[chosen]], axis=1)
    place = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    gains, gaps, counts = (
        np.bincount(place, weights=values[chosen]).astype(np.float64)
        for values in (before - after, before - teacher, like.positions)
    )
    total = float(gaps.sum())
    gap = bootstrap(gaps, counts) if total > 0 else None
    share = bootstrap(gains, gaps) if gap is not None and gap[0] > 0 else None
    return {
        "loss_before": float(before[chosen].sum() / counts.sum()),
        "loss_after": float(after[chosen].sum() / counts.sum()),
        "teacher_loss": float(teacher[chosen].sum() / counts.sum()),
        "documents": len(counts),
        "gap_closed": float(gains.sum()) / total if total > 0 else None,
        "interval": None if share is None else list(share),
    }
