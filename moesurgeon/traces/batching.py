"""Which windows go through the model together.

A row holds one document, so short documents are padded to the longest of their batch rather than packed into one
row: attention needs no mask between documents then, positions are those that the model would see, and no expert is
chosen from another document's text. What padding costs is kept low by the division instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moesurgeon.traces.windows import Window

_MOST_ROWS = 64  # results are kept by row of a batch, as many as the largest batch has
_BATCH_COSTS = 512  # as many tokens: weights are read and kernels started however little there is to compute


def batches(windows: Sequence[Window], rows: int, tokens: int = 0) -> Iterator[list[Window]]:
    """Yield groups of at most ``rows`` windows, longest first: windows of a group are about as long.

    A group of short windows has more rows, up to 64 and ``tokens`` with its padding. Of all divisions of the sorted
    windows it is the one that costs least, a batch costing 512 tokens beside its own: documents of 50 tokens are
    padded by 6 % in 65,536 tokens of one domain, of any length up to 512 by 4 %. Equal lengths stay in the order
    given. Every window comes once.

    >>> group = [Window("d", 0, 0, np.zeros(size, np.int32)) for size in (400, 8, 390, 9)]
    >>> [[len(window.tokens) for window in each] for each in batches(group, rows=4, tokens=8192)]
    [[400, 390], [9, 8]]
    """
    ordered = sorted(windows, key=lambda window: -len(window.tokens))
    lengths = np.array([len(window.tokens) for window in ordered], dtype=np.int64)
    start = 0
    for size in _sizes(lengths, rows, tokens):
        yield ordered[start : start + size]
        start += size


def _sizes(lengths: np.ndarray, rows: int, tokens: int) -> list[int]:
    """Return the sizes of the groups into which ``lengths``, falling, are divided at the least cost."""
    count = len(lengths)
    cost = np.zeros(count + 1, dtype=np.int64)  # of all windows from here on
    size = np.zeros(count, dtype=np.int64)  # of the group that begins here
    for start in range(count - 1, -1, -1):
        most = min(count - start, max(rows, min(_MOST_ROWS, tokens // int(lengths[start]))))
        choices = np.arange(1, most + 1) * lengths[start] + cost[start + 1 : start + most + 1] + _BATCH_COSTS
        size[start] = most - int(choices[::-1].argmin())  # of equal ones the largest
        cost[start] = choices[size[start] - 1]
    sizes, start = [], 0
    while start < count:
        sizes.append(int(size[start]))
        start += sizes[-1]
    return sizes
