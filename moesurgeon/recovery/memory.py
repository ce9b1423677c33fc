"""About what a recovery holds in memory at once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from moesurgeon.engine.device import Placement
from moesurgeon.families.keys import count_of
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.targets import parts_of
from moesurgeon.runtime.cost import count_parameters
from moesurgeon.surgery.anatomy import Anatomy


def training_bytes(
    anatomy: Anatomy, placement: Placement, adapt: Sequence[str], losses: Losses, schedule: Schedule
) -> int:
    """Return about the bytes that training ``anatomy`` takes: weights, what is trained, and one step.

    What is trained has 16 bytes a number (float32 with its gradient and Adam's two moments). While experts are
    trained their merged weights exist beside their own, in the graph and when they are judged.
    """
    size = placement.dtype.itemsize
    weights = count_parameters(anatomy).total * size
    experts, hidden, wide, layers = anatomy.experts, anatomy.hidden, anatomy.expert_width, len(anatomy.moe_layers)
    rank, trained, merged = schedule.rank, 0, 0
    if "full-routers" in adapt:
        trained += layers * experts * hidden
    elif "routers" in adapt:
        trained += layers * rank * (experts + hidden)
    if "experts" in parts_of(adapt):
        trained += layers * experts * rank * (hidden + wide)
        merged += layers * experts * hidden * wide
    if "experts-all" in adapt:
        trained += layers * experts * rank * (hidden + 2 * wide)
        merged += 2 * layers * experts * hidden * wide
    return weights + 16 * trained + 2 * merged * size + _step_bytes(anatomy, placement, adapt, losses, schedule)


def _step_bytes(
    anatomy: Anatomy, placement: Placement, adapt: Sequence[str], losses: Losses, schedule: Schedule
) -> int:
    """Return about what one step's activations take, as ``engine.budget`` counts those of a layer, and its logits."""
    learns = "routers" in parts_of(adapt) and losses.objective == "distill"
    each = min(schedule.candidates or anatomy.experts, anatomy.experts) if learns else anatomy.top_k
    active = max(each, anatomy.top_k)
    layer = (16 * anatomy.hidden + active * (4 * anatomy.expert_width + 2 * anatomy.hidden)) * placement.dtype.itemsize
    kept = 1 if schedule.recompute else anatomy.layers
    logits = 4 * 4 * count_of(anatomy.config, "vocab_size", 0)  # float32: logits, both distributions, the gradient
    return schedule.tokens_per_step * (
        kept * layer + anatomy.layers * anatomy.hidden * placement.dtype.itemsize + logits
    )
