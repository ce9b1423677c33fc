"""``evaluate``: held-out loss, alone or against another checkpoint."""

from __future__ import annotations

from typing import Any

from moesurgeon.engine.device import place
from moesurgeon.engine.model import load_model
from moesurgeon.evaluation.measure import measure
from moesurgeon.evaluation.summary import summarise
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.text import read_text, window_length
from moesurgeon.progress import SILENT, Progress


def evaluate(
    source: str, against: str | None, text: Text, running: Running, progress: Progress = SILENT
) -> dict[str, Any]:
    """Measure ``source`` on the report split, and its distance from the checkpoint ``against``."""
    subject = open_subject(source)
    other = open_subject(against) if against else None
    placement = place(running.device, running.dtype, subject.stored_dtype)
    corpus = read_text(subject, text, builtin_split="report")
    model = load_model(subject.checkpoint, subject.anatomy, placement)
    teacher = load_model(other.checkpoint, other.anatomy, placement) if other else None
    measured = measure(model, corpus, length=window_length(subject, text), teacher=teacher, progress=progress)
    return {
        "checkpoint": source,
        "compared_with": against,
        "splits": dict(corpus.splits),
        "trace_hashes": dict(corpus.hashes),
        "placement": str(placement),
        **summarise(measured),
    }
