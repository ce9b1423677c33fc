"""``evaluate``: held-out loss, alone or against another checkpoint."""

from __future__ import annotations

from typing import Any

from moesurgeon.engine.device import place
from moesurgeon.engine.ranks import join_ranks
from moesurgeon.engine.streams import Stream
from moesurgeon.evaluation.measure import measure
from moesurgeon.evaluation.summary import summarise
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.pipeline.walking import ready
from moesurgeon.progress import SILENT, Progress


def evaluate(
    source: str, against: str | None, text: Text, running: Running, progress: Progress = SILENT
) -> dict[str, Any]:
    """Measure ``source`` on the report split, and its distance from the checkpoint ``against``."""
    subject = open_subject(source)
    other = open_subject(against) if against else None
    placement = place(running.device, running.dtype, subject.stored_dtype)
    corpus = read_text(subject, text, builtin_split="report")
    ranks = join_ranks(running.device)
    subjects = [subject, other] if other else [subject]
    length = window_length(subject, text)
    with ready(subjects, corpus, placement, length=length, max_memory=running.max_memory) as walk:
        streams = [Stream(each) for each in walk.sources]
        measured = measure(
            streams[0],
            corpus.domains,
            walk.batches,
            teacher=streams[1] if other else None,
            ranks=ranks,
            folder=walk.folder,
            progress=progress,
        )
        is_resident = walk.is_resident
    return {
        "checkpoint": source,
        "compared_with": against,
        "splits": dict(corpus.splits),
        "trace_hashes": dict(corpus.hashes),
        "placement": str(placement),
        "resident": is_resident,
        **summarise(measured),
    }
