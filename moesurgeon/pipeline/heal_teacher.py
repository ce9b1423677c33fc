"""Whom healing comes back to, where that is another checkpoint."""

from __future__ import annotations

from moesurgeon.errors import UsageError
from moesurgeon.pipeline.options import HealSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.tokenizers import refuse_other_tokenizer
from moesurgeon.progress import Progress


def teacher_of(subject: Subject, spec: HealSpec, progress: Progress) -> Subject | None:
    """Return the teacher, if it is another checkpoint than ``subject``; UsageError for one that cannot be."""
    other = open_subject(spec.teacher) if spec.teacher else None
    if other is None:
        return None
    refuse_other_tokenizer(subject, other, progress)
    if other.fingerprint == subject.fingerprint:
        return None
    mine, theirs = subject.anatomy, other.anatomy
    if (mine.layers, mine.hidden) != (theirs.layers, theirs.hidden):
        raise UsageError(
            f"{spec.teacher} has {theirs.layers} layers of width {theirs.hidden}, {subject.name} has {mine.layers} of "
            f"{mine.hidden}: no teacher for it; give the checkpoint that it was made from"
        )
    return other
