"""Fewer experts per token: one number in the config, under every name that it has there."""

from __future__ import annotations

from dataclasses import dataclass

from moesurgeon.errors import UsageError
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import EditPlan, identity


@dataclass(frozen=True, kw_only=True)
class RetopSpec:
    """``top_k``: experts per token after the edit."""

    top_k: int = 1


def plan_retop(source: Anatomy, spec: RetopSpec) -> EditPlan:
    """Plan the change of the gate to ``spec.top_k`` experts per token; no tensor changes.

    Where the gate renormalises, the weights go on adding up to one; where it does not, they add up to
    less than before (the weight of the strongest alone), so the output shrinks until it is healed.
    """
    if not 1 <= spec.top_k <= source.top_k:
        raise UsageError(
            f"--top-k {spec.top_k} is not between 1 and the checkpoint's {source.top_k}: retop only takes experts away"
        )
    plan = identity(source)
    if spec.top_k == source.top_k:
        return plan
    present = [key for key in source.family.top_k_keys if key in source.config]
    record = {"operation": "retop", "top_k": {"before": source.top_k, "after": spec.top_k}}
    return EditPlan(plan.outputs, {}, dict.fromkeys(present, spec.top_k), [record])
