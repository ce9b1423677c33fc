"""Which tokens of the text are looked at closely: so many of all, by a hash of what is said there.

A token's key depends on its window (domain, place in the document, tokens) and its position there, on nothing
else; the tokens with the least keys are taken. So the sample is uniform over tokens, the same in every layer,
and does not change with the order of the text, the size of batches or the number of processes; of a text that
grows, what stays in the sample was in it before.

Legend: T positions of a batch's windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesurgeon.engine.batches import Batch
from moesurgeon.traces.windows import Window

Rows = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 1 << 20  # keys that are held besides the least ones


def sampled_rows(batches: Sequence[Batch], count: int) -> list[Rows]:
    """Return for each batch which rows of its flattened tokens [windows x T] are among ``count`` of all text.

    Ascending; all of the text where it has fewer tokens.
    """
    keys, places = np.empty(0, np.uint64), np.empty((0, 2), np.int64)
    waiting: list[tuple[NDArray[np.uint64], Rows]] = []
    for number, batch in enumerate(batches):
        length = batch.tokens.shape[1]
        for row, window in enumerate(batch.windows):
            at = row * length + np.arange(len(window.tokens))
            waiting.append((keys_of(window), np.stack([np.full_like(at, number), at], axis=1)))
        if number == len(batches) - 1 or sum(len(some) for some, _ in waiting) >= _AT_ONCE:
            keys = np.concatenate([keys, *(some for some, _ in waiting)])
            places = np.concatenate([places, *(some for _, some in waiting)])
            # Stable: of windows that say the same the first ones.
            least = np.argsort(keys, kind="stable")[:count]
            keys, places, waiting = keys[least], places[least], []
    return [np.sort(places[places[:, 0] == number, 1]) for number in range(len(batches))]


def keys_of(window: Window) -> NDArray[np.uint64]:
    """Return a uniform key for every token [T] of ``window``: SplitMix64, seeded by what the window says."""
    digest = hashlib.blake2b(f"{window.domain}\0{window.start}\0".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(window.tokens, dtype="<i4").tobytes())
    seed = np.uint64(int.from_bytes(digest.digest(), "big"))
    with np.errstate(over="ignore"):  # arithmetic is meant to be modulo 2^64
        key = seed + np.arange(1, len(window.tokens) + 1, dtype=np.uint64) * _GOLDEN
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result: NDArray[np.uint64] = key ^ (key >> np.uint64(31))
    return result
