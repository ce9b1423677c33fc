"""``retop``: fewer experts per token."""

from __future__ import annotations

from typing import Any

from moesurgeon.pipeline.foresight import Foresight, foresee, refuse_unforeseeable, write_divided
from moesurgeon.pipeline.inspect import output_scale
from moesurgeon.pipeline.options import HealSpec, Running, Writing
from moesurgeon.pipeline.provenance import refuse_stale_record
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.pipeline.write import finish_healed, refuse_output
from moesurgeon.progress import SILENT, Progress
from moesurgeon.runtime.cost import count_flops
from moesurgeon.surgery.retop import RetopSpec, plan_retop


def retop(
    source: str,
    spec: RetopSpec,
    writing: Writing,
    progress: Progress = SILENT,
    *,
    foresight: Foresight | None = None,
    heal: HealSpec | None = None,
    running: Running | None = None,
) -> dict[str, Any]:
    """Write ``source`` with ``spec.top_k`` experts per token, healed if ``heal`` says how.

    Before that ``foresight`` says what a profile tells of it: collapse, errors by layer.
    """
    subject, asked = open_subject(source), foresight or Foresight()
    refuse_stale_record(subject)
    refuse_output(writing, subject.root)
    plan = plan_retop(subject.anatomy, spec)
    after = plan.result(subject.anatomy)
    refuse_unforeseeable(asked, subject, writing)
    foreseen = foresee(subject, spec.top_k, asked, progress)
    for warning in foreseen["warnings"]:  # before the work, so that it can be stopped
        progress.note(f"note: {warning}")
    report = {
        "top_k": {"before": subject.anatomy.top_k, "after": spec.top_k},
        "renormalises": {"before": subject.anatomy.renormalises, "after": after.renormalises},
        "output_scale": output_scale(subject.anatomy, spec.top_k),
        "flops_per_token": {"before": count_flops(subject.anatomy).total, "after": count_flops(after).total},
        **foreseen,
        **finish_healed(plan, subject, heal, running or Running(), writing, progress),
    }
    if asked.out is not None:
        report["per_layer_out"] = str(asked.out)
        if not writing.dry_run:
            write_divided(asked.out, foreseen["divided"], overwrite=writing.overwrite)
    return report
