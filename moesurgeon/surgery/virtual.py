"""Virtual pruning: experts that stay stored and that no token is given to any more.

Where the choice goes by score plus a bias per expert (DeepSeek-V3, GLM-4, dots, ERNIE 4.5, MiniMax-M2, LFM2; GPT-OSS
has a bias in its logits), the bias of an expert can put it out of reach: the model is then the one without it. No byte
is saved and every runtime loads the result, so that layers may lose different numbers of experts, which no stock
runtime allows where they are removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError, UsageError
from moesurgeon.surgery import edits
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.edits import Pure
from moesurgeon.surgery.plan import EditPlan, identity
from moesurgeon.surgery.prune import Kept, check_experts

OUT_OF_REACH = -1e4
"""The bias of an expert that nobody is to be given (-9984 in bfloat16): finite, since the sum of a routing group's best
two must not become a NaN anywhere, and far below what scores (0 to 1) and biases come to."""
_TRAINED = OUT_OF_REACH / 2  # no bias that was trained is under this
_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


def plan_virtual(source: Anatomy, kept: Kept) -> EditPlan:
    """Plan that no token is given to an expert that is not in ``kept``; nothing else changes.

    ``kept`` needs an entry per mixture layer, of any length that can run; layers for multi-token prediction that it
    leaves out stay as they are. Raises UsageError for a family without such a bias and for too few experts.
    """
    check_virtual(source, kept)
    dropped = {
        layer: [expert for expert in range(source.experts) if expert not in set(kept[layer])] for layer in sorted(kept)
    }
    dropped = {layer: experts for layer, experts in dropped.items() if experts}
    plan = identity(source)
    if not dropped:
        return plan
    outputs = dict(plan.outputs)
    for layer, experts in dropped.items():
        name = bias_of(source, layer)
        if name is None:
            raise _without_bias(source, f"layer {layer}")
        outputs[name] = edits.transform(source.tensors[name], _put_out_of_reach(source.tensors[name], experts))
    record = {
        "operation": "virtual-prune",
        "experts": source.experts,
        "bias": OUT_OF_REACH,
        "dropped": {str(layer): experts for layer, experts in dropped.items()},
    }
    return EditPlan(outputs, record=[record])


def kept_without(source: Anatomy, dropped: Kept) -> dict[int, list[int]]:
    """Return what stays in every mixture layer when ``dropped`` go: from the record back to the plan."""
    layers = {*source.moe_layers, *dropped}
    return {
        layer: [expert for expert in range(source.experts) if expert not in set(dropped.get(layer, ()))]
        for layer in sorted(layers)
    }


def bias_of(source: Anatomy, layer: int) -> str | None:
    """Return the name of the bias [E] that takes part in the choice of ``layer``; None where there is none."""
    for name, _role in source.of_kind("rows", layer=layer):
        if not name.endswith(".weight"):
            return name
    return None


def refuse_without_bias(source: Anatomy) -> None:
    """Raise UsageError unless the experts of some layer can be put out of reach."""
    if all(bias_of(source, layer) is None for layer in source.moe_layers):
        raise _without_bias(source, source.family.title)


def least_of_group(source: Anatomy) -> int:
    """Return how many experts every routing group (without groups: every layer) has to keep.

    So many that whichever groups win, a token finds its top-k there, and that a group's score is taken of experts
    that are there; then nobody whom the bias puts out of reach is ever the best that is left.
    """
    groups, kept_groups = source.groups
    rule = source.family.router.groups
    least = rule.least if rule is not None and groups > 1 else 1
    return max(least, -(-source.top_k // kept_groups))


def check_virtual(source: Anatomy, kept: Kept) -> None:
    """Raise UsageError if a token could be left without ``top_k`` experts that are ``kept``."""
    refuse_without_bias(source)
    check_experts(source, kept, needed=source.moe_layers)
    groups, _kept_groups = source.groups
    least, size = least_of_group(source), source.experts // groups
    for layer, experts in kept.items():
        for group in range(groups):
            count = sum(expert // size == group for expert in experts)
            if count < least:
                where = f"layer {layer}" + (f", routing group {group}," if groups > 1 else "")
                raise UsageError(
                    f"{where} keeps {count} experts; keep at least {least}"
                    + (" in every group" if groups > 1 else "")
                    + f": each token is routed to {source.top_k}"
                )


def _without_bias(source: Anatomy, what: str) -> UsageError:
    return UsageError(
        f"--virtual needs a bias that takes part in the choice of experts, and {what} has none; leave --virtual out: "
        "experts are then removed, the same number from every layer"
    )


def _put_out_of_reach(spec: TensorSpec, experts: Sequence[int]) -> Pure:
    """Return a function from the bytes of a bias [E] or [1, E] to those with ``experts`` out of reach.

    The function raises CheckpointError where another expert is out of reach already: it would not be chosen, and its
    layer could have too few.
    """
    if spec.dtype not in _STORED:
        raise UsageError(f"{spec.name} is stored as {spec.dtype}, which holds no bias of {OUT_OF_REACH:g}; convert it")

    def function(raw: bytes) -> bytes:
        import numpy as np

        stored = np.frombuffer(raw, dtype=_STORED[spec.dtype]).copy()
        is_upper_half = spec.dtype == "BF16"  # of a float32; that of -1e4 is -9984, to the nearest as well
        values = (stored.astype(np.uint32) << 16).view(np.float32) if is_upper_half else stored
        others = np.ones(len(values), dtype=bool)
        others[list(experts)] = False
        gone = np.flatnonzero(others & ~(values > _TRAINED))
        if len(gone):
            raise CheckpointError(
                f"{spec.name} has expert {gone[0]} out of reach already, and it is to stay; let it go as well "
                "(--keep-experts), or start from the checkpoint without that edit"
            )
        stored[list(experts)] = 0xC61C if is_upper_half else OUT_OF_REACH
        return bytes(stored.tobytes())

    return Pure(f"out of reach {spec.dtype} {list(spec.shape)} {list(experts)}", function)
