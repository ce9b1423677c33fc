"""What a teacher says of a text, taken down in one walk: whether all its weights are in memory or read layer by layer.

Legend: N tokens of text of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesurgeon.engine.batches import Batch, rows_for, to_batch
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer, Tail, Walk
from moesurgeon.progress import Progress
from moesurgeon.recovery.estimator import Learning
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.teacher import Likeliest
from moesurgeon.traces.windows import Corpus

Array = NDArray[Any]


def spoken_batches(corpus: Corpus, length: int, device: torch.device, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Return the windows of ``corpus`` in their order, in batches of about ``tokens``."""
    step = rows_for(length, tokens)
    return [to_batch(corpus.windows[start : start + step], device) for start in range(0, len(corpus.windows), step)]


def write_said(
    part: Path,
    teacher: Stream,
    learning: Learning,
    batches: Sequence[Batch],
    losses: Losses,
    *,
    states: Path | None,
    progress: Progress,
) -> Mapping[str, Array]:
    """Write what ``losses`` ask for into files in ``part``, a row for each token, and return them.

    The files are mapped: what is written need not fit into memory. ``states``: as in ``Walk``.
    """
    rows = _Rows(part, batches)
    if not losses.from_teacher:
        return rows.arrays
    walk = Walk([teacher], batches, states)
    total = sum(batch.text_tokens for batch in batches)
    # Logits cost about as much as a layer, and have as large a part of the bar.
    share = 1 / (teacher.source.layers + (losses.objective == "distill"))
    with progress.task("asking the teacher", total, "tokens") as advance:
        with closing(walk.layers()) as layers:
            for layer in layers:
                for number, batch in enumerate(batches):
                    _pass(layer, teacher, learning, number, losses, rows)
                    advance(batch.text_tokens * share)
        if losses.objective == "distill":
            for tail in walk.tail():
                for number, batch in enumerate(batches):
                    likeliest = _likeliest(tail, teacher, number, losses.temperature)
                    rows.put("indices", number, likeliest.indices.int())
                    rows.put("logq", number, likeliest.logq)
                    rows.put("logq_rest", number, likeliest.logq_rest)
                    advance(batch.text_tokens * share)
    for array in rows.arrays.values():
        array.flush()  # type: ignore[attr-defined]
    return rows.arrays


def _pass(layer: Layer, teacher: Stream, learning: Learning, number: int, losses: Losses, rows: _Rows) -> None:
    """Take a batch through ``layer`` and write what is asked of it there."""
    text = layer.walk.batches[number].is_text
    with learning.recording() as routed:
        layer.move(teacher, number)
    if losses.router:
        for each in routed:
            rows.put(f"router.{layer.number}", number, each.logits[text.flatten()].float())
    if losses.hidden:
        # numpy knows no bfloat16; float16 would overflow on the outliers of large models.
        rows.put(f"hidden.{layer.number}", number, layer.walk.hidden[teacher].get(number)[text].float())


def _likeliest(tail: Tail, teacher: Stream, number: int, temperature: float) -> Likeliest:
    """Return what is kept of the logits of a batch, of which only some positions' are in memory at once."""
    batch, hidden = tail.walk.batches[number], tail.walk.hidden[teacher].get(number)
    found = []
    with torch.no_grad():
        for some in hidden[batch.is_text].split(teacher.source.scratch.positions):
            found.append(Likeliest.of(tail.on(teacher, some[None])[0], temperature))
    return Likeliest(
        torch.cat([each.indices for each in found]),
        torch.cat([each.logq for each in found]),
        torch.cat([each.logq_rest for each in found]),
    )


class _Rows:
    """Files in ``part`` with a row for each token of ``batches``, one batch after the other."""

    def __init__(self, part: Path, batches: Sequence[Batch]) -> None:
        self._part = part
        counts = [batch.text_tokens for batch in batches]
        self._starts = [sum(counts[:number]) for number in range(len(counts))]
        self._total = sum(counts)
        self.arrays: dict[str, Array] = {}

    def put(self, name: str, batch: int, rows: torch.Tensor) -> None:
        values = rows.cpu().numpy()
        if name not in self.arrays:
            shape = (self._total, *values.shape[1:])
            self.arrays[name] = np.lib.format.open_memmap(self._part / f"{name}.npy", "w+", values.dtype, shape)
        start = self._starts[batch]
        self.arrays[name][start : start + len(values)] = values
