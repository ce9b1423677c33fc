"""Judging a model under training, and its teacher, on text that neither is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch, batches_of, rows_for
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.evaluation.measure import LOSS, Measurement, measure
from moesurgeon.progress import SILENT, Progress
from moesurgeon.recovery.closed import Sums
from moesurgeon.recovery.estimator import Learning
from moesurgeon.recovery.monitor import Counts, Monitor
from moesurgeon.surgery.anatomy import Anatomy
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


class Judge:
    """Measures ``model`` as it is on ``heldout``, in windows of up to ``length`` tokens."""

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, learning: Learning, heldout: Corpus, length: int
    ) -> None:
        self._model, self._anatomy, self._learning = model, anatomy, learning
        self._domains = heldout.domains
        self._batches: list[Batch] = list(batches_of(heldout, rows=rows_for(length), device=model.device))

    def judged(self, progress: Progress = SILENT) -> Judgement:
        """Return losses and use of the model; it needs nothing but a forward pass."""
        monitor = Monitor(self._anatomy, self._batches)
        stream = Stream(Source.of_model(self._model, self._anatomy))
        with self._learning.watched(monitor.watch):
            measured = measure(stream, self._domains, self._batches, progress=progress, label="judging")
        return Judgement(measured.sums[:, LOSS], monitor.counts, measured, monitor.windows)
