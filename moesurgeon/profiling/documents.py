"""Sums by document: what tells how sure a profile is, since tokens of one document resemble each other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moesurgeon.engine.batches import Batch
from moesurgeon.profiling.statistics import CLUSTERED, FOLDS, Array, Statistics

_TOKENS = CLUSTERED.index("tokens")


class Documents:
    """Adds up, layer by layer, the sums of each document of ``batches``.

    Documents are dealt into folds by a hash of their text, so that the order in which they come does not matter.
    """

    def __init__(self, domains: tuple[str, ...], batches: Sequence[Batch], experts: int) -> None:
        numbers: dict[tuple[int, int], int] = {}
        self._of_batch = [
            np.array([
                numbers.setdefault((domains.index(batch.domain), window.document), len(numbers))
                for window in batch.windows
            ])
            for batch in batches
        ]  # fmt: skip
        self._domain = np.array([domain for domain, _ in numbers])
        self._tokens = np.zeros(len(numbers))
        hashes = [b"\xff" * 8] * len(numbers)
        for batch, places in zip(batches, self._of_batch, strict=True):
            for window, place in zip(batch.windows, places, strict=True):
                self._tokens[place] += len(window.tokens)
                digest = hashlib.blake2b(window.tokens.tobytes(), digest_size=8).digest()
                hashes[place] = min(hashes[place], digest)  # the least: whichever window comes first
        self._fold = np.array([int.from_bytes(digest, "big") % FOLDS for digest in hashes])
        self._sums = np.zeros((len(numbers), len(CLUSTERED), experts))

    def folds(self, batch: int) -> Array:
        """Return the fold of each window of ``batch``."""
        return self._fold[self._of_batch[batch]]

    def count(self, statistics: Statistics) -> None:
        """Add the text itself: documents, their lengths, tokens by fold."""
        np.add.at(statistics.sums["documents"], self._domain, 1)
        np.add.at(statistics.sums["documents.squares"], self._domain, self._tokens**2)
        np.add.at(statistics.sums["seen.folds"], (self._domain, self._fold), self._tokens)

    def add(self, batch: int, by_window: Array) -> None:
        """Add the sums [W, 4, E] of the windows of ``batch``."""
        np.add.at(self._sums, self._of_batch[batch], by_window)

    def finish(self, statistics: Statistics, layer: int) -> None:
        """Add squares, products and folds of the layer in place ``layer``, and begin the next one."""
        routed = self._sums[:, _TOKENS]
        for column, name in enumerate(CLUSTERED):
            x = self._sums[:, column]
            for suffix, values in (
                ("squares", x * x),
                ("by_document", x * self._tokens[:, None]),
                ("by_tokens", x * routed),
            ):
                target = statistics.sums[f"{name}.{suffix}"][:, layer]
                np.add.at(target, self._domain, values)
            np.add.at(statistics.sums[f"{name}.folds"][:, :, layer], (self._domain, self._fold), x)
        self._sums[:] = 0.0
