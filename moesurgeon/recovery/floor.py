"""Experts that recovery starves: used less than a part of their fair share, as they were not before, or half as much.

A count of held-out choices is a sample. Whether an expert fell is first read off the counts; that it fell surely takes
two things more: the text is long enough that chance alone would not have left it so few choices, and the 95 % interval
of its share over documents, whose tokens resemble each other, ends below the floor. Only that is held against a state.

Legend: W windows, D documents, L mixture layers, E experts, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesurgeon.profiling.collapse import STARVED
from moesurgeon.recovery.judge import Judgement
from moesurgeon.recovery.monitor import usage_of
from moesurgeon.surgery.anatomy import Anatomy

_CHANCE = 0.05
_RESAMPLES, _SEED = 1000, 20251122


def use_of(anatomy: Anatomy, before: Judgement, after: Judgement, least: float = STARVED) -> dict[str, dict[str, Any]]:
    """Return the figures of :func:`monitor.usage_of` by layer, and who fell since ``before``.

    ``fallen``: the experts below ``least`` of an even share that were not, and those that were and have lost half of
    what they had; ``starved``: those that surely are.
    """
    found = usage_of(anatomy, after.counts)
    least = least or STARVED  # what is told where every state may be kept
    for row, figures in enumerate(found.values()):
        then, now = (_shares(each.counts[:, row].sum(axis=0)) for each in (before, after))
        floor = np.where(then >= least, least, then / 2)
        fallen = np.flatnonzero(now < floor)
        starved = fallen[_surely_below(_by_document(after, row), fallen, floor[fallen])] if fallen.size else fallen
        figures.update(fallen=fallen.tolist(), starved=starved.tolist())
    return found


def starves(usage: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether :func:`use_of` found an expert in any layer that surely fell."""
    return any(figures["starved"] for figures in usage.values())


def _shares(counts_E: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of the choices that each expert has, as part of an even one."""
    shares: NDArray[np.float64] = counts_E * (len(counts_E) / max(1, counts_E.sum()))
    return shares


def _by_document(judged: Judgement, row: int) -> NDArray[np.float64]:
    """Return the choices of one layer by document [D, E]."""
    keys = np.stack([judged.measured.domain, judged.measured.document], axis=1)
    place = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    counts = np.zeros((int(place.max()) + 1, judged.windows.shape[-1]))
    np.add.at(counts, place, judged.windows[:, row])
    return counts


def _surely_below(
    counts_DE: NDArray[np.float64], experts: NDArray[np.int64], floors: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Return which of ``experts`` are below their floor of an even share, beyond chance and choice of documents.

    None of them where all of the text is one document, which does not tell how much documents differ.
    """
    if len(counts_DE) < 2:
        return np.zeros(len(experts), dtype=bool)
    even = float(counts_DE.sum()) / counts_DE.shape[-1]
    rng = np.random.default_rng(_SEED)
    documents = len(counts_DE)
    drawn_RD = rng.multinomial(documents, np.full(documents, 1 / documents), size=_RESAMPLES)
    totals_R = np.maximum(1, drawn_RD @ counts_DE.sum(axis=1)) / counts_DE.shape[-1]
    high = np.quantile(drawn_RD @ counts_DE[:, experts] / totals_R[:, None], 0.975, axis=0)
    rare = [
        _at_most(int(counts_DE[:, expert].sum()), floor * even) < _CHANCE
        for expert, floor in zip(experts, floors, strict=True)
    ]
    return np.array(rare, dtype=bool) & (high < floors)


def _at_most(count: int, mean: float) -> float:
    """Return how often a Poisson number with this mean is at most ``count``.

    >>> round(_at_most(0, 3.0), 3), round(_at_most(2, 1.0), 3)
    (0.05, 0.92)
    """
    return math.fsum(math.exp(number * math.log(mean) - mean - math.lgamma(number + 1)) for number in range(count + 1))
