"""Losses of a model, and how far it is from a teacher, summed per window of text.

Legend: B windows, T tokens, V vocabulary. Logits exist for a block of positions at a time only: the
full [B, T, V] of a long batch would be larger than the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.finite import culprits
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Tail, Walk
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.progress import SILENT, Progress

LOSS, TEACHER_LOSS, KL, AGREEMENT, ESAP = range(5)
"""Columns of the sums: cross-entropy in nats, the teacher's, KL(teacher | model), share of positions
with the same most likely token, and the sum over the vocabulary of min(p, q) (ESAP, EvoESAP)."""
_COLUMNS = 5
EDGES = (0, *(1 << power for power in range(7, 24)))
"""Where buckets of positions begin: 0, 128, 256, 512 ... 8 Mi; long context is where rare experts live."""


@dataclass(frozen=True)
class Measurement:
    """Sums per window and bucket of positions: ``buckets`` [W, K, 6] holds the columns above, then how many
    tokens were predicted. ``domain`` and ``document`` [W] number the windows'. ``tokens_per_second``: of the
    model alone, the median over batches: one busy moment of the machine does not count.
    """

    domains: tuple[str, ...]
    domain: NDArray[np.int64]
    document: NDArray[np.int64]
    buckets: NDArray[np.float64]
    tokens_per_second: float
    tokens: int
    has_teacher: bool

    @cached_property
    def sums(self) -> NDArray[np.float64]:
        """The columns of each window [W, 5]."""
        sums: NDArray[np.float64] = self.buckets[..., :_COLUMNS].sum(axis=1)
        return sums

    @cached_property
    def positions(self) -> NDArray[np.float64]:
        """How many tokens of each window were predicted [W]."""
        positions: NDArray[np.float64] = self.buckets[..., _COLUMNS].sum(axis=1)
        return positions


def measure(
    stream: Stream,
    domains: tuple[str, ...],
    batches: Sequence[Batch],
    *,
    teacher: Stream | None = None,
    ranks: Ranks | None = None,
    folder: Path | None = None,
    progress: Progress = SILENT,
    label: str = "evaluating",
) -> Measurement:
    """Take ``stream`` (and ``teacher`` beside it) through ``batches`` of text of these ``domains``.

    Of several ``ranks`` each walks with its batches, and all return the measurement of all. ``folder``:
    where hidden states go if not into memory.
    """
    refuse_other_vocabulary(stream, teacher)
    ranks = ranks or Ranks()
    mine = [batches[number] for number in ranks.mine(len(batches))]
    walk = Walk([stream] if teacher is None else [stream, teacher], mine, folder)
    most = max(len(batch.windows) for batch in batches)
    longest = max(batch.tokens.shape[1] for batch in batches)
    sums = np.zeros((len(mine), most, len(_edges(longest)), _COLUMNS + 1))
    layers = stream.source.layers
    with progress.task(label, sum(batch.text_tokens for batch in mine), "tokens") as advance:
        # Logits cost about as much as a layer, and have as large a part of the bar.
        walk.through(advance=lambda done: advance(done * layers / (layers + 1)))
        for tail in walk.tail():
            for number, batch in enumerate(mine):
                values_BTC = _compare(tail, stream, teacher, number, batch)
                values_BTC[~batch.is_text[:, 1:].cpu().numpy()] = 0.0
                edges = _edges(batch.tokens.shape[1])
                sums[number, : len(values_BTC), : len(edges)] = np.add.reduceat(values_BTC, edges, axis=1)
                advance(batch.text_tokens / (layers + 1))
    sums = ranks.gathered(sums, len(batches))
    seconds = ranks.gathered(walk.seconds[stream], len(batches))
    if not np.isfinite(sums).all():
        raise _not_a_number(stream)
    rows = [(domains.index(batch.domain), window.document) for batch in batches for window in batch.windows]
    domain, document = np.array(rows, dtype=np.int64).T
    tokens = np.array([batch.text_tokens for batch in batches])
    return Measurement(
        domains,
        domain,
        document,
        np.concatenate([part[: len(batch.windows)] for part, batch in zip(sums, batches, strict=True)]),
        float(np.median(tokens / np.maximum(seconds, 1e-9))),
        int(tokens.sum()),
        teacher is not None,
    )


def _not_a_number(stream: Stream) -> CheckpointError:
    """Return what to raise where the layers gave numbers, and what comes after them did not."""
    source = stream.source
    names = [] if source.holds_a_model else culprits(source.read(source.skeleton.names_of_tail()), stream.pieces)
    if names:
        return CheckpointError(
            f"the loss is not a number, since {', '.join(names)} holds NaN or infinities; restore it"
        )
    return CheckpointError("the loss is not a number: logits overflow in this --dtype; try float32")


def _edges(length: int) -> list[int]:
    """Return the edges below the last of ``length`` tokens, which predicts nothing."""
    return [edge for edge in EDGES if edge < length - 1]


def refuse_other_vocabulary(stream: Stream, teacher: Stream | None) -> None:
    """Raise UsageError if the two cannot be compared token by token."""
    if teacher is None:
        return
    mine, theirs = (one.skeleton.model.config.vocab_size for one in (stream, teacher))
    if mine != theirs:
        raise UsageError(
            f"vocabularies differ ({mine} and {theirs} tokens): "
            "only checkpoints with the same tokenizer can be compared"
        )


@torch.no_grad()
def _compare(tail: Tail, stream: Stream, teacher: Stream | None, number: int, batch: Batch) -> NDArray[np.float64]:
    """Return the columns and ones [B, T - 1, 6] for predicting tokens 1 to T - 1."""
    rows, length = batch.tokens.shape
    values = torch.zeros(rows, length - 1, _COLUMNS + 1, dtype=torch.float64)
    values[..., _COLUMNS] = 1
    step = max(1, stream.source.scratch.positions // rows)
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        targets = batch.tokens[:, start + 1 : stop + 1, None]
        logp = tail.logits(stream, number, start, stop).float().log_softmax(-1)
        block = values[:, start:stop]
        block[..., LOSS] = -logp.gather(-1, targets).squeeze(-1).double().cpu()
        if teacher is None:
            continue
        logq = tail.logits(teacher, number, start, stop).float().log_softmax(-1)
        p, q = logp.exp(), logq.exp()
        block[..., TEACHER_LOSS] = -logq.gather(-1, targets).squeeze(-1).double().cpu()
        block[..., KL] = (q * (logq - logp)).sum(-1, dtype=torch.float64).cpu()
        block[..., AGREEMENT] = (logp.argmax(-1) == logq.argmax(-1)).double().cpu()
        block[..., ESAP] = torch.minimum(p, q).sum(-1, dtype=torch.float64).cpu()
    return values.numpy()
