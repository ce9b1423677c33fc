"""From checkpoints and text to sources and batches that a walk can begin with, within the memory allowed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moesurgeon.engine.batches import BATCH_TOKENS, Batch, batches_of, rows_for
from moesurgeon.engine.budget import share_out
from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Source
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.traces.windows import Corpus


@dataclass(frozen=True)
class Ready:
    """``sources``: one per checkpoint; ``folder``: where hidden states have to go, None if into memory."""

    sources: Sequence[Source]
    batches: Sequence[Batch]
    folder: Path | None

    @property
    def is_resident(self) -> bool:
        """Whether all weights stay in memory."""
        return all(source.supply.plan.is_resident for source in self.sources)


@contextmanager
def ready(
    subjects: Sequence[Subject], corpus: Corpus, placement: Placement, *, length: int, max_memory: int | None
) -> Iterator[Ready]:
    """Open ``subjects`` to walk with ``corpus`` in windows of up to ``length`` tokens.

    ``max_memory``: bytes that the process (on an accelerator: the device) may take; None: most of what is
    free. Raises UsageError if that is too little, OutputError if there is nowhere to put hidden states.
    """
    batches = list(batches_of(corpus, rows=rows_for(length), tokens=BATCH_TOKENS, device=placement.device))
    with ExitStack() as stack:
        sources = [
            stack.enter_context(Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement))
            for subject in subjects
        ]
        fits = share_out(max_memory, sources, batches)
        yield Ready(sources, batches, stack.enter_context(hidden_folder(fits)))


@contextmanager
def hidden_folder(fits: bool) -> Iterator[Path | None]:
    """Give the folder for hidden states that do not fit into memory; None for those that do.

    Raises OutputError if there is none to be had.
    """
    if fits:
        yield None
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="moesurgeon-")
    except OSError as error:
        raise OutputError(
            f"no folder for hidden states could be made ({error.strerror}); point TMPDIR at a disk with room"
        ) from error
    with folder as path:
        yield Path(path)
