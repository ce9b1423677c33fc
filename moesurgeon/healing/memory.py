"""What healing a layer takes: known before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.streams import Stream
from moesurgeon.healing.align import EXACT
from moesurgeon.healing.block import is_of
from moesurgeon.healing.merge import OUTPUTS, SAMPLE
from moesurgeon.healing.pace import Method, Pace
from moesurgeon.healing.ridge import CHUNK

_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True)
class HealingBytes:
    """``work``: beside the walk, while a layer is healed. ``held``: data and healed tensors, which may be in files."""

    work: int
    held: int


def healing_bytes(
    student: Stream, method: Method, pace: Pace, batches: Sequence[Batch], *, merge: bool = False
) -> HealingBytes:
    """Return what healing ``student`` on ``batches`` takes.

    Its own copy of a layer that the plan changes, and of what is healed the candidate and its rounding. Ridge: five
    matrices of an expert's (or the shared experts') width, squared, in float64, and the activations of a chunk.
    Distillation: masters, gradients (as they are, and split by expert) and both of Adam's moments in float32, and the
    best state so far. Merging: the merged experts and their rounding, the refit of those that are not merged, and
    what ``_aligning`` takes. Of the data x, z, what is missing in float32, and the routing of each token.
    """
    size = student.source.placement.dtype.itemsize
    work, healed = 0, 0
    for block in student.blocks.values():
        counts = _counts(student, block, pace)
        downs = sum(count for name, count in counts.items() if "down" in name)
        wide = max(_width(student, block, name) for name in counts if "down" in name)
        copy = sum(counts.values()) * size
        need = 2 * downs * size + 5 * wide**2 * _DOUBLE + CHUNK * (3 * wide + 3 * student.anatomy.hidden) * _DOUBLE
        if method == "distill":
            trained = sum(counts.values())
            need = max(need, trained * (5 * _FLOAT + 3 * size) + _activations(student, pace))
        if merge:
            folded = 2 * sum(counts.values()) * size
            need = max(need + folded + downs * size, folded + _aligning(student))
        work = max(work, copy + need)
        healed += (sum(counts.values()) if method == "distill" else downs) * size
        healed += sum(counts.values()) * size if merge else 0  # healed with and without
    tokens = sum(batch.text_tokens for batch in batches)
    row = student.anatomy.hidden * (2 * size + _FLOAT) + student.anatomy.top_k * (8 + _FLOAT)
    return HealingBytes(work, tokens * row + healed) if method != "none" or merge else HealingBytes(0, 0)


def _counts(student: Stream, block: MoeBlock, pace: Pace) -> dict[str, int]:
    """Return the number of values of all that may be trained in ``block``."""
    targets = student.skeleton.targets
    return {
        name: prod(targets[f"{block.name}.{name}"].shape)
        for name, _parameter in block.module.named_parameters()
        if is_of(block, name, router=pace.router)
    }


def _width(student: Stream, block: MoeBlock, name: str) -> int:
    return student.skeleton.targets[f"{block.name}.{name}"].shape[-1]


def _activations(student: Stream, pace: Pace) -> int:
    """Return what a training step keeps of its tokens: inputs, gate, up, activation and output by expert."""
    per_expert = 5 * student.anatomy.expert_width + 3 * student.anatomy.hidden
    return pace.tokens_per_step * (student.anatomy.top_k + 1) * per_expert * _FLOAT


def _aligning(student: Stream) -> int:
    """Return what comparing experts takes: outputs of all of them, then for a pair its sums, weights and activations,
    five matrices of width by width, and two in float64 of what is assigned exactly."""
    width, hidden = student.anatomy.expert_width, student.anatomy.hidden
    outputs = max(OUTPUTS, student.source.anatomy.experts * hidden * _FLOAT)
    pair = 4 * 3 * hidden * width + 4 * SAMPLE * width + 5 * width**2
    return max(outputs, pair * _FLOAT + 2 * min(width, EXACT) ** 2 * _DOUBLE)
