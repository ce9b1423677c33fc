"""Whether a recovery holds the checkpoint in memory, and how memory is shared out where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moesurgeon.engine.budget import free_bytes, share_out
from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Source
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.options import Running
from moesurgeon.pipeline.walking import hidden_folder
from moesurgeon.recovery.judge import judged_batches
from moesurgeon.recovery.memory import streamed_bytes, training_bytes
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.streamed import PIECE, Streaming
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus


def fits(
    anatomy: Anatomy, placement: Placement, adapt: Sequence[str], losses: Losses, schedule: Schedule, running: Running
) -> bool:
    """Whether training can hold all weights in memory. Raises UsageError for more than one device."""
    if placement.spread:
        raise UsageError("recover trains on one device; name it, as in --device cuda:0")
    needed = training_bytes(anatomy, placement, adapt, losses, schedule)
    return needed <= free_bytes(running.max_memory, placement.device)


@contextmanager
def streaming(
    source: Source, training: Training, heldout: Corpus, max_memory: int | None, *, least: bool, folder: Path
) -> Iterator[Streaming]:
    """Share memory out among the layers of ``source``, what a step needs beside them, and the states that it keeps.

    ``least``: no layer stays in memory, even if there is room. ``folder``: for the best experts. Raises UsageError
    where not even two layers fit.
    """
    needed = streamed_bytes(source.anatomy, source.placement, training, PIECE)
    batches = judged_batches(heldout, training.length, source.placement.device)
    in_memory = share_out(max_memory, [source], batches, work=needed.work, held=needed.held)
    if least:
        source.supply.allow(source.supply.least)
    with hidden_folder(in_memory) as states:
        yield Streaming(folder, states)
