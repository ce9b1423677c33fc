"""Fewer experts per token: one number in the config, under every name that it has there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.families.keys import value_at
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.counts import top_k_counts
from moesurgeon.surgery.plan import EditPlan, identity
from moesurgeon.surgery.tables import first_columns


@dataclass(frozen=True, kw_only=True)
class RetopSpec:
    """``top_k``: experts per token after the edit."""

    top_k: int = 1


def plan_retop(source: Anatomy, spec: RetopSpec) -> EditPlan:
    """Plan the change of the gate to ``spec.top_k`` experts per token.

    No tensor changes, except that a table from token to experts keeps its first columns.

    Where the gate renormalises, the weights go on adding up to one; where it does not, they add up to
    less than before (the weight of the strongest alone), so the output shrinks until it is healed.
    """
    if not 1 <= spec.top_k <= source.top_k:
        raise UsageError(
            f"--top-k {spec.top_k} is not between 1 and the checkpoint's {source.top_k}: retop only takes experts away"
        )
    if source.family.fixed_top_k is not None:
        raise UsageError(
            f"the router of {source.family.title} takes {source.family.fixed_top_k} experts per token whatever "
            "config.json says: there is nothing that retop could edit; prune works"
        )
    plan = identity(source)
    if spec.top_k == source.top_k:
        return plan
    for name in source.depending_on_top_k():
        raise CheckpointError(
            f"{name} has shape {list(source.tensors[name].shape)}, so it may follow the top {source.top_k}, and "
            f"no {source.family.title} checkpoint has it: nobody knows how to cut it; save the checkpoint without it"
        )
    outputs = dict(plan.outputs)
    for name, _role in source.of_kind("table"):
        outputs[name] = first_columns(source.tensors[name], spec.top_k)
    config: dict[str, Any] = {}
    for key in top_k_counts(source):
        value = value_at(source.config, key)
        per_layer = isinstance(value, list)
        config[key] = [min(each, spec.top_k) for each in value] if per_layer else spec.top_k
    record = {"operation": "retop", "top_k": {"before": source.top_k, "after": spec.top_k}}
    return EditPlan(outputs, {}, config, [record])
