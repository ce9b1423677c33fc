"""``retop``: fewer experts per token."""

from __future__ import annotations

from typing import Any

from moesurgeon.checkpoint.open import CONFIG_NAME
from moesurgeon.pipeline.inspect import output_scale
from moesurgeon.pipeline.options import HealSpec, Running, Writing
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
    heal: HealSpec | None = None,
    running: Running | None = None,
) -> dict[str, Any]:
    """Write ``source`` with ``spec.top_k`` experts per token, healed if ``heal`` says how."""
    subject = open_subject(source)
    refuse_output(writing.output, CONFIG_NAME, overwrite=writing.overwrite, sources=(subject.root,))
    plan = plan_retop(subject.anatomy, spec)
    after = plan.result(subject.anatomy)
    return {
        "top_k": {"before": subject.anatomy.top_k, "after": spec.top_k},
        "output_scale": output_scale(subject.anatomy, spec.top_k),
        "flops_per_token": {"before": count_flops(subject.anatomy).total, "after": count_flops(after).total},
        **finish_healed(plan, subject, heal, running or Running(), writing, progress),
    }
