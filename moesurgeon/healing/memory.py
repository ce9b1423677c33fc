"""What healing a layer takes: known before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.scratch import BATCH_TOKENS
from moesurgeon.engine.streams import Stream
from moesurgeon.healing import bound
from moesurgeon.healing.align import EXACT
from moesurgeon.healing.block import is_of
from moesurgeon.healing.distil import token_bytes, tokens_of_piece
from moesurgeon.healing.merge import OUTPUTS, SAMPLE
from moesurgeon.healing.pace import Method, Pace
from moesurgeon.healing.ridge import ROW_BYTES, chunk_tokens
from moesurgeon.healing.router import fit_bytes
from moesurgeon.healing.trials import activation_bytes, cache_bytes, normal_bytes
from moesurgeon.profiling.all_experts import LIKELIEST

_FLOAT, _DOUBLE = 4, 8
_INNER, _SUBSETS = 192 << 20, 64 << 20  # outputs of experts and those in float64; subsets at once (profiling)


@dataclass(frozen=True)
class HealingBytes:
    """``copy``: of a layer, while it is there. ``work``: beside it, while it is healed and no batch walks. ``held``:
    data and healed tensors, which may be in files."""

    copy: int
    work: int
    held: int


def healing_bytes(
    student: Stream,
    method: Method,
    pace: Pace,
    batches: Sequence[Batch],
    *,
    merge: bool = False,
    at_once: int = BATCH_TOKENS,
) -> HealingBytes:
    """Return what healing ``student`` on ``batches`` takes; ``at_once``: tokens that a block is given at once.

    Its own copy of a layer that the plan changes, and of what is healed the candidate and its rounding. Ridge: the
    normal equations of the expert (or the shared experts) that needs most, see :func:`refit_bytes`. Distillation:
    masters, gradients (as they are, and split by expert) and both of Adam's moments in float32, and the best state so
    far. Merging: the merged experts and their rounding, the refit of those that are not merged, and what ``_aligning``
    takes. Of the data x, z, what is missing in float32, and the routing of each token.
    """
    size = student.source.placement.dtype.itemsize
    if method == "none" and not merge:
        return HealingBytes(student.copied_bytes, 0, 0)
    copy, work, healed = student.copied_bytes, 0, 0
    for block in student.blocks.values():
        counts = _counts(student, block, pace)
        downs = sum(count for name, count in counts.items() if "down" in name)
        widths = [_width(student, block, name) for name in counts if "down" in name]
        copy = max(copy, sum(counts.values()) * size)
        refit = max(refit_bytes(student.anatomy.hidden, wide, pace.rank, method, at_once) for wide in widths)
        forward = block_bytes(student, max(widths), at_once)
        need = 2 * downs * size + max(refit, forward)
        if pace.router:
            need = max(need, 2 * downs * size + fit_bytes(student.anatomy.experts, student.anatomy.hidden))
        if method == "distill":
            trained = sum(counts.values())
            need = max(
                need, trained * (5 * _FLOAT + 3 * size) + max(forward, _of_step(student, pace, trained, at_once))
            )
        if merge:
            folded = 2 * sum(counts.values()) * size
            need = max(need + folded + downs * size, folded + _aligning(student))
        work = max(work, need)
        changed = sum(counts.values()) if method == "distill" else downs
        if pace.router and method != "distill":
            changed += student.anatomy.experts * student.anatomy.hidden
        if merge:  # healed with and without
            changed += sum(counts.values())
        healed += changed * size
    tokens = sum(batch.text_tokens for batch in batches)
    row = student.anatomy.hidden * (2 * size + _FLOAT) + student.anatomy.top_k * (8 + _FLOAT) + _FLOAT
    return HealingBytes(copy, work, tokens * row + healed)


def block_bytes(student: Stream, shared: int, tokens: int) -> int:
    """Return what a block takes that is given so many tokens, and its error (``healing.block``).

    Inputs, outputs and their concatenation by expert; of one expert, which may get all tokens, or of the shared ones
    (of width ``shared``), gate, up and what comes of them; output, target and their difference in float32.
    """
    anatomy, size = student.anatomy, student.source.placement.dtype.itemsize
    wide = max(anatomy.expert_width, shared)
    return tokens * (anatomy.hidden * ((3 * anatomy.top_k + 2) * size + 3 * _FLOAT) + 4 * wide * size)


def trial_bytes(stream: Stream, tokens: int, at_once: int = BATCH_TOKENS) -> int:
    """Return what choosing experts of ``stream`` by trials on ``tokens`` of a layer takes beside the walk.

    The sample with what is missing; activations and factors as far as they are kept (``healing.trials``), those of
    the shared experts as well; normal matrices and activations of one expert; inner products, and what they are made
    of; both less where only ``at_once`` tokens are computed. And the stream's own copy of a layer that a plan has
    changed.
    """
    anatomy, size = stream.anatomy, stream.source.placement.dtype.itemsize
    sample = tokens * (anatomy.hidden * (size + 2 * _FLOAT) + 3 * anatomy.experts * _FLOAT)
    kept = min(LIKELIEST, anatomy.experts)
    inner = min(tokens, bound.TOKENS) * kept * (kept + 1) * _FLOAT + _SUBSETS + _INNER * at_once // BATCH_TOKENS
    cache = cache_bytes(at_once)
    work = 0
    for block in stream.blocks.values():
        counts = _counts(stream, block, Pace())
        wide = max(_width(stream, block, name) for name in counts if "down" in name)
        experts = activation_bytes(anatomy.experts, wide, tokens)
        factors = normal_bytes(anatomy.experts, wide)
        need = sum(each if each <= cache else 0 for each in (experts, factors))
        need += normal_bytes(1, wide) + 4 * tokens * wide * _FLOAT  # of the shared, and of the one at work
        work = max(work, need + (sum(counts.values()) * size if stream.overlay.plan else 0))
    return sample + inner + work


def refit_bytes(high: int, wide: int, rank: int | None, method: Method = "ridge", at_once: int = BATCH_TOKENS) -> int:
    """Return what a refit of a map [H, F] takes (``high``, ``wide``): the largest of its phases.

    A chunk of tokens with its activations; with it the Gram matrices of both texts, with a rank rather the random
    matrix, the span so far, and its QR decomposition; in a solution two matrices more of that size, and seven of the
    size of the change (moments, solutions, products); at the end the change itself.
    """
    tokens = chunk_tokens(high, wide, at_once)
    chunk = tokens * (wide + high) * ROW_BYTES // _DOUBLE
    if method == "scale":
        return (chunk + 3 * high * wide) * _DOUBLE
    size = wide if rank is None else min(rank, wide)
    span = wide * size if size < wide else 0
    phases = (
        chunk + 5 * span + (tokens * size if span else 0),
        chunk + span + 2 * (size**2 + high * size) + (tokens * size if span else 0),
        span + 4 * size**2 + 7 * high * size,
        chunk + span + 2 * high * wide,
    )
    return max(phases) * _DOUBLE


def widest(student: Stream) -> int:
    """Return the largest width of what ``student``'s down projections are fed."""
    blocks = student.blocks.values()
    return max(
        _width(student, block, name) for block in blocks for name in _counts(student, block, Pace()) if "down" in name
    )


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


def _of_step(student: Stream, pace: Pace, trained: int, at_once: int) -> int:
    """Return what a training step keeps of its tokens, and where they come in pieces the gradient of one more."""
    anatomy = student.anatomy
    each = token_bytes(anatomy.expert_width, anatomy.hidden, anatomy.top_k)
    piece = tokens_of_piece(trained, each, pace, at_once)
    return piece * each + (_FLOAT * trained if piece < pace.tokens_per_step else 0)


def _aligning(student: Stream) -> int:
    """Return what comparing experts takes: outputs of all of them, then for a pair its sums, weights and activations,
    five matrices of width by width, and two in float64 of what is assigned exactly."""
    width, hidden = student.anatomy.expert_width, student.anatomy.hidden
    outputs = max(OUTPUTS, student.source.anatomy.experts * hidden * _FLOAT)
    pair = 4 * 3 * hidden * width + 4 * SAMPLE * width + 5 * width**2
    return max(outputs, pair * _FLOAT + 2 * min(width, EXACT) ** 2 * _DOUBLE)
