"""What of a healing cannot be, told from headers before other work."""

from __future__ import annotations

from moesurgeon.engine.device import place
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.healing.heal import refuse_quantised
from moesurgeon.pipeline.heal import check_heal
from moesurgeon.pipeline.heal_teacher import teacher_of
from moesurgeon.pipeline.options import HealSpec, Running
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT


def refuse_unhealable(subject: Subject, spec: HealSpec, running: Running) -> None:
    """Raise what healing ``subject``, or a cut of it, would raise whatever the text."""
    check_heal(spec)
    teacher_of(subject, spec, SILENT)
    if spec.method == "none" and not spec.merge:
        return
    placement = place(running.device, running.dtype, subject.stored_dtype)
    with Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement) as source:
        refuse_quantised(Stream(source))
