"""Healing a cut, layer by layer: each on what the healed layers before it give, each only if it helps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch

from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.routing import routing_of
from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Walk
from moesurgeon.errors import CheckpointError
from moesurgeon.healing.block import Values, error_of, own_values
from moesurgeon.healing.data import BlockData, block_data
from moesurgeon.healing.distil import distilled
from moesurgeon.healing.dropped import became_of_dropped, move_watched
from moesurgeon.healing.merge import Merged, Merger, put
from moesurgeon.healing.pace import Method, Pace
from moesurgeon.healing.ridge import refitted
from moesurgeon.healing.room import Room
from moesurgeon.healing.router import fitted_router
from moesurgeon.progress import SILENT, Advance, Progress


def heal(
    walk: Walk,
    student: Stream,
    teacher: Stream,
    train: Sequence[int],
    heldout: Sequence[int],
    *,
    method: Method,
    pace: Pace,
    merge: bool = False,
    room: Room | None = None,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Take both streams of ``walk`` through all layers, healing ``student``'s blocks on the way.

    Returns by layer the error on held-out tokens before and after each step, and whether the step was kept; and of
    each expert that the student's plan dropped what became of its tokens (``healing.dropped``), where the teacher's
    experts have the numbers of the student's source.

    ``train`` and ``heldout`` are numbers of batches of the walk, which must not share text. What is better on
    held-out tokens goes into ``student.overlay.tensors``, rounded as it is stored; the rest stays as it was.
    ``merge``: try also to begin with survivors into which the dropped experts are folded (``healing.merge``).
    ``room``: where a layer's data and the healed tensors are held (None: in memory).
    """
    refuse_quantised(student)
    reports: list[dict[str, Any]] = []
    room = room or Room()
    merger = Merger(student) if merge else None
    layers = student.anatomy.moe_layers
    total = len(layers) * (pace.steps if method == "distill" else 1)
    with progress.task("healing", total, "steps") as advance, closing(walk.layers()) as walking:
        for layer in walking:
            for number in train:
                layer.move(teacher, number)
            given = move_watched(layer, teacher, heldout)
            if layer.number in layers and (method != "none" or merger):
                sets = (
                    block_data(layer, student, teacher, train, room, "train"),
                    block_data(layer, student, teacher, heldout, room, "heldout"),
                )
                folded = merger.merged(layer, sets[0]) if merger else None
                values, report = _healed(
                    student, layer.number, sets, folded, method=method, pace=pace, room=room, advance=advance
                )
                report |= became_of_dropped(student, teacher, layer.number, values, sets[1], given)
                del sets, folded
                reports.append(report)
                for name, tensor in values.items():
                    student.overlay.tensors[name] = room.kept(tensor)
                    layer.rebind(student, name)
            for number in (*train, *heldout):
                layer.move(student, number)
    return reports


def steps_of(method: Method, pace: Pace) -> tuple[str, ...]:
    """Return what is done to a layer, in this order.

    >>> steps_of("ridge", Pace(router=True)), steps_of("distill", Pace())
    (('ridge', 'router'), ('ridge', 'distill'))
    """
    if method == "none":
        return ()
    first = "ridge" if method == "distill" else method
    return (first, *(["router"] if pace.router else []), *(["distill"] if method == "distill" else []))


def refuse_quantised(student: Stream) -> None:
    """Raise CheckpointError if experts are stored with scales, which healing does not make anew."""
    for block in student.blocks.values():
        for name in own_values(block):
            for piece in student.stored_parts(f"{block.name}.{name}"):
                if piece.scale is not None:
                    raise CheckpointError(
                        f"{piece.source} is stored as {student.anatomy.tensors[piece.source].dtype} with scales, and "
                        "healed experts would have to be quantised again; convert the checkpoint to bfloat16 first"
                    )


def _healed(
    student: Stream,
    layer: int,
    sets: tuple[BlockData, BlockData],
    folded: Merged | None,
    *,
    method: Method,
    pace: Pace,
    room: Room,
    advance: Advance,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the values that are better, by the running model's names, and the report of the layer."""
    block, (train, heldout) = student.blocks[layer], sets
    own = own_values(block)
    error = error_of(block, own, heldout)
    report: dict[str, Any] = {"layer": layer, "tokens": len(train), "error": error, "steps": []}
    first, *later = steps_of(method, pace) or ("none",)
    refit = partial(_refitted, student, block, method=first, rank=pace.rank, room=room)
    values, error, report["steps"] = refit({}, error, sets)
    if folded is not None:
        start = _as_stored(student, block, folded.values)
        begun = error_of(block, {**own, **start}, heldout)
        with put(student, block, start):
            other, left, steps = refit(start, begun, sets)
        kept = left < error
        merging = {"step": "merge", "error": begun, "healed_error": left, "unmerged_error": error, "kept": kept}
        merging["into"] = {str(dropped): survivor for dropped, survivor in folded.into.items()}
        if kept:
            values, error, report["steps"] = other, left, steps
        report["steps"].insert(0, merging)
    for step in later:
        if step == "distill":
            candidate, _ = distilled(block, values, train, heldout, pace, advance)
        else:
            routing = routing_of(student.anatomy)
            candidate = values | fitted_router(block, values, train, heldout, routing, seed=pace.seed)
        candidate = _as_stored(student, block, candidate)
        found = error_of(block, {**own, **candidate}, heldout)
        kept = found < error
        report["steps"].append({"step": step, "error": found, "kept": kept})
        if kept:
            values, error = candidate, found
    report["healed_error"] = error
    if method != "distill":
        advance(1)
    return {f"{block.name}.{name}": tensor for name, tensor in values.items()}, report


def _refitted(
    student: Stream,
    block: MoeBlock,
    start: dict[str, torch.Tensor],
    error: float,
    sets: tuple[BlockData, BlockData],
    *,
    method: str,
    rank: int | None,
    room: Room,
) -> tuple[dict[str, torch.Tensor], float, list[dict[str, Any]]]:
    """Return ``start``, which ``block`` computes with, refitted if that lowers its ``error``; the error; the step."""
    if method == "none":
        return start, error, []
    candidate = _as_stored(student, block, refitted(block, *sets, method=method, rank=rank, room=room))
    found = error_of(block, {**own_values(block), **candidate}, sets[1])
    kept = found < error
    step = {"step": method, "error": found, "kept": kept}
    return ({**start, **candidate}, found, [step]) if kept else (start, error, [step])


def _as_stored(student: Stream, block: MoeBlock, values: Values) -> dict[str, torch.Tensor]:
    return {name: student.as_stored(f"{block.name}.{name}", tensor) for name, tensor in values.items()}
