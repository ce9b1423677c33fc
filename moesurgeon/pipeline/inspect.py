"""``inspect``: what a checkpoint is, from its headers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from moesurgeon.families.keys import value_at
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.runtime.cost import count_flops, count_parameters
from moesurgeon.surgery.anatomy import Anatomy


def inspect(name: str) -> dict[str, Any]:
    """Describe the checkpoint; problems are listed, not raised, unless it cannot be read at all."""
    subject = open_subject(name, complete=False)
    anatomy, checkpoint = subject.anatomy, subject.checkpoint
    parameters = count_parameters(anatomy)
    dtypes = Counter[str]()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    groups, kept_groups = anatomy.groups
    return {
        "checkpoint": name,
        "family": anatomy.family.name,
        "title": anatomy.family.title,
        "layers": anatomy.layers,
        "moe_layers": list(anatomy.moe_layers),
        "mtp_layers": list(anatomy.mtp_layers),
        "experts": anatomy.experts,
        "top_k": anatomy.top_k,
        "shared_experts": anatomy.shared_experts,
        "hidden_size": anatomy.hidden,
        "expert_width": anatomy.expert_width,
        "routing": {
            "scoring": anatomy.family.router.scoring,
            "renormalises": anatomy.renormalises,
            "groups": groups,
            "kept_groups": kept_groups,
            "selection_bias": anatomy.family.router.selection_bias,
        },
        "parameters": {"total": parameters.total, "active": parameters.active, "experts": parameters.experts},
        "flops_per_token": count_flops(anatomy).as_dict(),
        "bytes": checkpoint.nbytes,
        "dtype": dtypes.most_common(1)[0][0],
        "dtypes": dict(dtypes),
        "layout": anatomy.layout.name,
        "shards": len(checkpoint.headers),
        "fingerprint": subject.fingerprint,
        "problems": [*subject.problems, *subject.warnings, *subject.odd_routers],
        "left_out": list(subject.beside.left_out),
    }


def output_scale(anatomy: Anatomy, top_k: int) -> str:
    """Say in a sentence what fewer experts per token do to the size of the block's output."""
    rule = anatomy.family.router
    if rule.renormalises(anatomy.config, top_k):
        scale = value_at(anatomy.config, rule.scale_key)
        total = float(rule.scale_default if scale is None else scale)
        return (
            "the gate renormalises: the weights of the remaining experts still add up to "
            f"{'one' if total == 1 else f'{total:g}'}"
        )
    if anatomy.renormalises:
        return (
            "the gate renormalises several choices, but leaves the weight of a single one as it is: the routed output "
            "shrinks to the share of the best expert"
        )
    return "the gate does not renormalise: the routed output shrinks with every expert that is left out"
