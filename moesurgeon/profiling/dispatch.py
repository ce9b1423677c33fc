"""What a runtime with limited places would do with the loads that were seen: overflow, padding, stragglers.

Computed while profiling from the loads of the batches themselves, top-1 from first choices: halving the
loads of a top-2 gate would hide how much more uneven first choices are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moesurgeon.profiling.statistics import BLOCK_ROWS, FACTORS, SIZES, Array, Statistics, capacity_of


def add_dispatches(statistics: Statistics, layer: int, tokens: Sequence[int], loads: tuple[Array, Array]) -> None:
    """Add the windows of a batch, of so many ``tokens`` and with these ``loads`` [W, E] of both gates.

    For each size, windows are put together until a dispatch has so many tokens; a rest of under half is left out,
    and so is a window of over twice as many, which would pass for a smaller dispatch than it is.
    """
    for size_number, size in enumerate(SIZES):
        for start, stop in _groups(tokens, size):
            for gate, by_window in enumerate(loads):
                load = by_window[start:stop].sum(axis=0)
                choices = float(load.sum())
                blocks = float((np.ceil(load / BLOCK_ROWS) * BLOCK_ROWS).sum())
                statistics.sums["dispatch"][layer, size_number, gate] += (1.0, float(load.max()), blocks, choices)
                for number, factor in enumerate(FACTORS):
                    places = capacity_of(int(choices), statistics.experts, factor)
                    dropped = float(np.maximum(load - places, 0.0).sum())
                    total = (choices, dropped, float(places * statistics.experts))
                    statistics.sums["capacity"][layer, size_number, number, gate] += total


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
