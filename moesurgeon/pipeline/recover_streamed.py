"""Whether a recovery holds the checkpoint in memory, and how memory is shared out either way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.budget import Demand, share_out
from moesurgeon.engine.memory_use import MemoryUse
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Source
from moesurgeon.engine.working import ALONE
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.options import Running
from moesurgeon.pipeline.walking import hidden_folder
from moesurgeon.recovery.judge import judged_batches
from moesurgeon.recovery.memory import resident_bytes, streamed_bytes
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.streamed import PIECE, Streaming
from moesurgeon.traces.windows import Corpus


def share_training(
    source: Source, training: Training, heldout: Corpus, running: Running, ranks: Ranks, *, streamed: bool
) -> tuple[MemoryUse, bool]:
    """Share memory out among the weights of ``source``, what a step needs beside them, and judging on ``heldout``.

    All weights stay in memory if that is possible for all ``ranks``, unless training is to be ``streamed``; then no
    layer stays. Returns how memory is used, and whether layers are read at every step. Raises
    UsageError for more than one device, and where nothing fits.
    """
    placement = source.placement
    if placement.spread:
        raise UsageError("recover trains on one device; name it, as in --device cuda:0")

    @cache
    def batches(tokens: int) -> list[Batch]:
        return judged_batches(heldout, training.length, placement.device, tokens)

    def resident(tokens: int) -> Demand:
        takes = resident_bytes(source.anatomy, placement, training.adapt, training.losses, training.schedule)
        return Demand(batches=batches(tokens), logits=ALONE, always=takes.always, work=takes.work)

    def in_pieces(tokens: int) -> Demand:
        takes = streamed_bytes(source.anatomy, placement, training, min(PIECE, tokens))
        return Demand(batches=batches(tokens), logits=ALONE, always=takes.always, work=takes.work, held=takes.held)

    memory = None
    if not streamed:
        with suppress(UsageError):
            memory = share_out(running.max_memory, [source], resident, whole="training")
    if ranks.least(memory is not None) and memory is not None:
        return _agreed(memory, source, ranks), False
    memory = share_out(running.max_memory, [source], in_pieces)  # all stream or none does
    if streamed:
        source.supply.allow(source.supply.at_least(ahead=memory.read_ahead), ahead=memory.read_ahead)
    return _agreed(memory, source, ranks), True


def _agreed(memory: MemoryUse, source: Source, ranks: Ranks) -> MemoryUse:
    """Return ``memory`` with batches that all ``ranks`` have room for."""
    source.scratch = replace(source.scratch, tokens=ranks.least(memory.scratch.tokens))
    return replace(memory, scratch=source.scratch)


@contextmanager
def streaming(memory: MemoryUse, folder: Path) -> Iterator[Streaming]:
    """Yield where a streamed training puts what does not fit. ``folder``: for the best experts."""
    with hidden_folder(not memory.hidden_in_files) as states:
        yield Streaming(folder, states, min(PIECE, memory.scratch.tokens))
