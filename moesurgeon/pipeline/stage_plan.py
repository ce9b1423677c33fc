"""What a dry run says of a cut in stages: the counts, and of the first stage what traffic goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moesurgeon.pipeline.choice import choose
from moesurgeon.pipeline.healing_text import planned as planned_healing
from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.prune_spec import HEALED, PruneSpec
from moesurgeon.pipeline.stage_state import heal_of, of_count
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.write import finish
from moesurgeon.progress import Progress
from moesurgeon.selection.choose import best
from moesurgeon.selection.criteria import default_criterion
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.prune import plan_prune


def planned(
    subject: Subject, spec: PruneSpec, counts: tuple[int, ...], writing: Writing, progress: Progress
) -> dict[str, Any]:
    """Return what a dry run says: how many stay after each stage; which ones is for the stages to find out.

    With a profile the first one's experts are known, and what traffic they have. Bytes are those of the fewest experts.
    """
    experts = subject.anatomy.experts
    stages: list[dict[str, Any]] = [
        {"stage": f"count-{count:04d}" if spec.search else f"stage-{number:02d}", "experts_after": count}
        for number, count in enumerate(counts, start=1)
    ]
    warnings = []
    if spec.profile is not None and spec.criterion != HEALED:
        choice = choose(subject, spec if spec.keep_experts is not None else of_count(spec, counts[0]), progress)
        stages[0]["evidence"] = {"traffic_removed": choice.evidence["traffic_removed"]}
        warnings = [f"{stages[0]['stage']}: {warning}" for warning in choice.warnings]
    return {
        "kept": {},
        "dropped": {},
        "experts_before": experts,
        "experts_after": min(counts),
        "virtual": False,
        "criterion": spec.criterion or default_criterion(subject.anatomy.top_k)[0],
        "stages": stages,
        "healing": [],
        "healed": planned_healing(subject, heal_of(spec), progress),
        "warnings": warnings,
        **finish(any_cut(subject.anatomy, min(counts)), subject, replace(writing, allow_noop=True), progress),
    }


def any_cut(anatomy: Anatomy, count: int) -> EditPlan:
    """Plan to keep ``count`` experts a layer: for memory and disk any will do."""
    scores = np.zeros((len(anatomy.moe_layers), anatomy.experts))
    return plan_prune(anatomy, best(scores, anatomy.moe_layers, count, anatomy.groups[0]))
