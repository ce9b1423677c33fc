"""From checkpoints and text to sources and batches that a walk can begin with, within the memory allowed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moesurgeon.engine.batches import Batch, batches_of, rows_for
from moesurgeon.engine.budget import Demand, share_out
from moesurgeon.engine.device import Placement
from moesurgeon.engine.memory_use import MemoryUse
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.working import ALONE, COMPARED
from moesurgeon.errors import OutputError
from moesurgeon.pipeline.options import Running
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.traces.windows import Corpus


@dataclass(frozen=True)
class Ready:
    """``sources``: one per checkpoint; ``folder``: where hidden states have to go, None if into memory. ``memory``:
    how it is used."""

    sources: Sequence[Source]
    batches: Sequence[Batch]
    folder: Path | None
    memory: MemoryUse

    @property
    def is_resident(self) -> bool:
        """Whether all weights stay in memory."""
        return self.memory.resident


@contextmanager
def ready(
    subjects: Sequence[Subject],
    corpus: Corpus,
    placement: Placement,
    running: Running,
    *,
    length: int,
    judges: bool = True,
    plan: EditPlan | None = None,
    whole: str | None = None,
    work: int = 0,
    always: Callable[[int], int] | None = None,
    ranks: Ranks | None = None,
    progress: Progress = SILENT,
) -> Iterator[Ready]:
    """Open ``subjects`` to walk with ``corpus`` in windows of up to ``length`` tokens, within ``running.max_memory``.

    ``judges``: whether logits are needed. ``plan``: what the first subject walks with. ``whole``: who needs all weights
    in memory, and ``work`` bytes at another time than the walk; ``always``: bytes at all times, by the tokens of a
    batch. Raises UsageError if memory is too little, OutputError if there is nowhere to put hidden states.
    """

    @cache
    def batched(tokens: int) -> list[Batch]:
        return list(batches_of(corpus, rows=rows_for(length, tokens), tokens=tokens, device=placement.device))

    with ExitStack() as stack:
        sources = [
            stack.enter_context(Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement))
            for subject in subjects
        ]
        copies = 0 if plan is None else Stream(sources[0], Overlay(plan=plan)).copied_bytes
        logits = (ALONE if len(sources) == 1 else COMPARED) if judges else 0

        def demand(tokens: int) -> Demand:
            return Demand(
                batches=batched(tokens), logits=logits, copies=copies, work=work, always=always(tokens) if always else 0
            )

        memory = share_out(
            running.max_memory, sources, demand, whole=whole, agreed=None if ranks is None else ranks.least
        )
        folder = stack.enter_context(hidden_folder(not memory.hidden_in_files))
        if memory.note and (ranks is None or ranks.is_first):
            progress.note(memory.note)
        yield Ready(sources, batched(memory.scratch.tokens), folder, memory)


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
