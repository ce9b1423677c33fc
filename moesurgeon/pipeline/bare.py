"""What a cut costs by itself: the bare plan, beside which a healed one is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesurgeon.engine.device import place
from moesurgeon.engine.streams import Overlay, Stream
from moesurgeon.evaluation.measure import measure
from moesurgeon.evaluation.summary import summarise
from moesurgeon.pipeline.held_out import held_out_text
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.recipe import Step
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.text import window_length
from moesurgeon.pipeline.walking import ready
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import plan_retop
from moesurgeon.surgery.virtual import plan_virtual
from moesurgeon.traces.document_hashes import Hashes


def bare_plan(anatomy: Anatomy, step: Step, report: Mapping[str, Any]) -> EditPlan:
    """Return what ``step``, of which ``report`` came, would have made of ``anatomy`` without healing."""
    if step.retop:
        return plan_retop(anatomy, step.retop.spec)
    plan = plan_virtual if step.prune and step.prune.virtual else plan_prune
    return plan(anatomy, {int(layer): tuple(experts) for layer, experts in report["kept"].items()})


def bare_figures(
    source: str,
    step: Step,
    report: Mapping[str, Any],
    text: Text,
    running: Running,
    progress: Progress = SILENT,
    *,
    left_out: Hashes = frozenset(),
) -> dict[str, Any]:
    """Return loss and perplexity of ``step`` on ``source`` without healing, on the report split, also by domain.

    The plan walks as an overlay; nothing is written. ``left_out``: documents that are not measured on, as those that
    healed ``source`` are not.
    """
    subject = open_subject(source)
    corpus, _healed = held_out_text([subject], text, also=left_out)
    placement = place(running.device, running.dtype, subject.stored_dtype)
    length = window_length(subject, text)
    plan = bare_plan(subject.anatomy, step, report)
    with ready([subject], corpus, placement, running, length=length, plan=plan, progress=progress) as walk:
        stream = Stream(walk.sources[0], Overlay(plan=plan))
        measured = measure(stream, corpus.domains, walk.batches, folder=walk.folder, progress=progress)
    figures = summarise(measured)
    return {
        "loss": figures["loss"],
        "perplexity": figures["perplexity"],
        "interval": figures["interval"],
        "domains": {domain: each["perplexity"] for domain, each in figures["domains"].items()},
    }
