"""Judging a model under training, and its teacher, on text that neither is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moesurgeon.engine.batches import Batch, batches_of, rows_for
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.engine.streams import Stream
from moesurgeon.evaluation.measure import LOSS, Measurement, measure
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.closed import Sums
from moesurgeon.recovery.estimator import Learning
from moesurgeon.recovery.monitor import Counts, Monitor
from moesurgeon.traces.windows import Corpus


@dataclass(frozen=True)
class Judgement:
    """``sums``: the loss of each window; ``counts``: whom its routers chose, ``windows``: the same by window [W, L, E];
    ``measured`` knows the documents."""

    sums: Sums
    counts: Counts
    measured: Measurement
    windows: Counts

    @property
    def loss(self) -> float:
        """The mean loss per predicted token, in nats."""
        return float(self.sums.sum() / self.measured.positions.sum())


def judged_batches(heldout: Corpus, length: int, device: torch.device, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Return the batches of about ``tokens`` in which ``heldout`` is judged."""
    return list(batches_of(heldout, rows=rows_for(length, tokens), device=device))


class Judge:
    """Measures ``stream`` as it is on ``heldout``, in windows of up to ``length`` tokens.

    ``folder``: where hidden states go if not into memory. Of several ``ranks`` each takes some of the batches, and all
    return the judgement of all.
    """

    def __init__(
        self,
        stream: Stream,
        learning: Learning,
        heldout: Corpus,
        length: int,
        folder: Path | None = None,
        *,
        ranks: Ranks | None = None,
    ) -> None:
        self._stream, self._learning, self._folder, self._ranks = stream, learning, folder, ranks or Ranks()
        self._domains = heldout.domains
        source = stream.source
        self.batches: list[Batch] = judged_batches(heldout, length, source.placement.device, source.scratch.tokens)

    def judged(self, progress: Progress = SILENT) -> Judgement:
        """Return losses and use of the model; it needs nothing but a forward pass."""
        mine = self._ranks.mine(len(self.batches))
        monitor = Monitor(self._stream.anatomy, [self.batches[number] for number in mine])
        with self._learning.watched(monitor.watch):
            measured = measure(
                self._stream,
                self._domains,
                self.batches,
                ranks=self._ranks,
                folder=self._folder,
                progress=progress,
                label="judging",
            )
        windows = self._of_all(monitor.windows, mine)
        starts = np.cumsum([0, *(len(batch.windows) for batch in self.batches[:-1])])
        return Judgement(measured.sums[:, LOSS], np.add.reduceat(windows, starts, axis=0), measured, windows)

    def _of_all(self, windows: Counts, mine: Sequence[int]) -> Counts:
        """Return the counts by window of all ranks, in the order of the batches, from those of this one."""
        if self._ranks.size == 1:
            return windows
        sizes = [len(batch.windows) for batch in self.batches]
        padded = np.zeros((len(mine), max(sizes), *windows.shape[1:]))
        start = 0
        for place, number in enumerate(mine):
            padded[place, : sizes[number]] = windows[start : start + sizes[number]]
            start += sizes[number]
        found = self._ranks.gathered(padded, len(sizes))
        return np.concatenate([each[:size] for each, size in zip(found, sizes, strict=True)]).astype(np.int64)
