"""About what a recovery holds in memory at once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesurgeon.engine.device import Placement
from moesurgeon.families.keys import count_of
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.recovery.targets import parts_of
from moesurgeon.runtime.cost import count_flops
from moesurgeon.surgery.anatomy import Anatomy


@dataclass(frozen=True)
class ResidentBytes:
    """``always``: what is trained, beside the weights; ``work``: what a step needs."""

    always: int
    work: int


def resident_bytes(
    anatomy: Anatomy, placement: Placement, adapt: Sequence[str], losses: Losses, schedule: Schedule
) -> ResidentBytes:
    """Return about the bytes that training ``anatomy`` takes beside its weights.

    What is trained has 16 bytes a number (float32 with its gradient and Adam's two moments). While experts are
    trained their merged weights exist beside their own, in the graph and when they are judged.
    """
    size = placement.dtype.itemsize
    trained, merged = _trained(anatomy, adapt, schedule.rank)
    layers = anatomy.layers if not schedule.recompute else 1
    step = _step_bytes(anatomy, placement, adapt, losses, schedule, tokens=schedule.tokens_per_step, layers=layers)
    kept = schedule.tokens_per_step * anatomy.layers * anatomy.hidden * size
    return ResidentBytes(16 * trained + 2 * merged * size, step + kept)


@dataclass(frozen=True)
class StreamedBytes:
    """``always``: what is trained, and merged of a layer; ``work``: what a step needs beside the layers; ``held``: what
    can go to a file."""

    always: int
    work: int
    held: int


def streamed_bytes(anatomy: Anatomy, placement: Placement, training: Training, piece: int) -> StreamedBytes:
    """Return about the bytes that training takes beside the weights that are read, in pieces of ``piece`` tokens.

    Merged weights, in float32 with their change and their rounding, are there for one layer at a time. Held are the
    inputs of all layers, the gradient of one, and of a teacher that is matched everywhere as much again.
    """
    size, layers = placement.dtype.itemsize, anatomy.layers
    adapt, losses, schedule, length = training.adapt, training.losses, training.schedule, training.length
    trained, merged = _trained(anatomy, adapt, schedule.rank)
    step = max(length, schedule.tokens_per_step)
    piece = step if schedule.capacity is not None else min(step, max(length, piece))
    work = _step_bytes(anatomy, placement, adapt, losses, schedule, tokens=piece, layers=1)
    states = layers * (2 if losses.hidden else 1) + 4
    routers = 4 * anatomy.experts * len(anatomy.moe_layers) if losses.router else 0
    return StreamedBytes(
        16 * trained + 16 * merged // max(1, len(anatomy.moe_layers)),
        work + step * routers,
        step * states * anatomy.hidden * size,
    )


def _trained(anatomy: Anatomy, adapt: Sequence[str], rank: int) -> tuple[int, int]:
    """Return how many numbers are trained, and how many weights their adapters are merged into."""
    experts, hidden, wide, layers = anatomy.experts, anatomy.hidden, anatomy.expert_width, len(anatomy.moe_layers)
    trained, merged = 0, 0
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
        shared = count_flops(anatomy).shared_experts // 2
        merged += shared
        trained += rank * (3 * layers * hidden + shared // hidden) if shared else 0
    return trained, merged


def _step_bytes(
    anatomy: Anatomy,
    placement: Placement,
    adapt: Sequence[str],
    losses: Losses,
    schedule: Schedule,
    *,
    tokens: int,
    layers: int,
) -> int:
    """Return about what the activations of so many tokens and layers take, as ``engine.budget`` counts, and logits."""
    learns = "routers" in parts_of(adapt) and losses.objective == "distill"
    each = min(schedule.candidates or anatomy.experts, anatomy.experts) if learns else anatomy.top_k
    active = max(each, anatomy.top_k)
    layer = (16 * anatomy.hidden + active * (4 * anatomy.expert_width + 2 * anatomy.hidden)) * placement.dtype.itemsize
    logits = 4 * 4 * count_of(anatomy.config, "vocab_size", 0)  # float32: logits, both distributions, the gradient
    return tokens * (layers * layer + logits)
