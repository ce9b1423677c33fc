"""From the record of what was done back to a plan: how a result is proved against its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moesurgeon.errors import CheckpointError, MoeSurgeonError
from moesurgeon.surgery import edits
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, compose, identity
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from moesurgeon.surgery.runtimes import plan_config_class
from moesurgeon.surgery.virtual import kept_without, plan_virtual


class NotRecorded(Exception):
    """Bytes that an operation made anew, of which the record says only that they are new."""


def replay(source: Anatomy, operations: Iterable[Mapping[str, Any]]) -> EditPlan:
    """Plan again what ``operations`` (of a provenance file, so untrusted) did to ``source``.

    Tensors that an operation replaced have a part whose loading raises NotRecorded. Raises
    CheckpointError for a record that makes no sense.
    """
    plan = identity(source)
    for operation in operations:
        try:
            plan = compose(plan, _plan_again(plan.result(source), operation))
        except (MoeSurgeonError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = str(operation)[:60]
            raise CheckpointError(
                f"moesurgeon.json records {what!r}, which cannot be done to the source: {error}"
            ) from error
    return plan


def _plan_again(source: Anatomy, operation: Mapping[str, Any]) -> EditPlan:
    match operation["operation"]:
        case "retop":
            return plan_retop(source, RetopSpec(top_k=int(operation["top_k"]["after"])))
        case "prune":
            maps = operation["expert_map"]
            return plan_prune(source, {int(layer): [int(old) for old in maps[layer]] for layer in maps})
        case "virtual-prune":
            gone = operation["dropped"]
            dropped = {int(layer): [int(expert) for expert in gone[layer]] for layer in gone}
            return plan_virtual(source, kept_without(source, dropped))
        case "layout":
            # Earlier versions wrote no biases.
            return plan_layout(source, str(operation["layout"]), biases=bool(operation.get("biases")))
        case "config-class":
            return plan_config_class(source, ())
        case "recover" | "heal":
            outputs = dict(identity(source).outputs)
            for name in operation["replaced"]:
                outputs[name] = edits.replace(source.tensors[name], _unknown, key="not recorded")
            return EditPlan(outputs)
        case other:
            raise ValueError(f"unknown operation {other!r}")


def _unknown() -> bytes:
    raise NotRecorded
