"""What a runtime with limited places would do with the loads that were seen: overflow, padding, stragglers.

Computed while profiling from the loads of the batches themselves, top-1 from first choices: halving the
loads of a top-2 gate would hide how much more uneven first choices are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moesurgeon.profiling.statistics import BLOCK_ROWS, FACTORS, SIZES, Array, Statistics, capacities_of


def add_dispatches(statistics: Statistics, layer: int, tokens: Sequence[int], loads: tuple[Array, Array]) -> None:
    """Add the windows of a batch, of so many ``tokens`` and with these ``loads`` [W, E] of both gates.

    For each size, windows are put together until a dispatch has so many tokens; a rest of under half is left out,
    and so is a window of over twice as many, which would pass for a smaller dispatch than it is.
    """
    both = np.stack(loads)  # [G, W, E]
    for size_number, size in enumerate(SIZES):
        groups = list(_groups(tokens, size))
        if not groups:
            continue
        load = np.stack([both[:, start:stop].sum(axis=1) for start, stop in groups])  # [dispatches, G, E]
        choices = load.sum(axis=-1)
        blocks = (np.ceil(load / BLOCK_ROWS) * BLOCK_ROWS).sum(axis=-1)
        columns = (np.ones_like(choices), load.max(axis=-1), blocks, choices)
        statistics.sums["dispatch"][layer, size_number] += np.stack(columns, axis=-1).sum(axis=0)
        for number, factor in enumerate(FACTORS):
            places = capacities_of(choices, statistics.experts, factor)
            dropped = np.maximum(load - places[..., None], 0.0).sum(axis=-1)
            totals = np.stack((choices, dropped, places * statistics.experts), axis=-1).sum(axis=0)
            statistics.sums["capacity"][layer, size_number, number] += totals


def _groups(tokens: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of windows that have about ``size`` tokens together."""
    start, held = 0, 0
    for number, count in enumerate(tokens, start=1):
        held += count
        if held >= size:
            if held <= 2 * size:
                yield start, number
            start, held = number, 0
    if held >= size / 2:
        yield start, len(tokens)
