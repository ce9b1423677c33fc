"""Healing a cut, layer by layer: each on what the healed layers before it give, each only if it helps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch

from moesurgeon.engine.streams import Stream
from moesurgeon.engine.walk import Layer, Walk
from moesurgeon.errors import CheckpointError
from moesurgeon.healing.data import BlockData, block_data
from moesurgeon.healing.distil import distilled, error_of
from moesurgeon.healing.pace import Method, Pace
from moesurgeon.healing.ridge import refitted
from moesurgeon.healing.spill import Spill
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
    spill: Spill | None = None,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Take both streams of ``walk`` through all layers, healing ``student``'s blocks on the way.

    Returns by layer the error on held-out tokens before and after each step, and whether the step was kept.

    ``train`` and ``heldout`` are numbers of batches of the walk, which must not share text. What is better on
    held-out tokens goes into ``student.overlay.tensors``, rounded as it is stored; the rest stays as it was.
    ``spill``: where those are held (None: in memory).
    """
    reports: list[dict[str, Any]] = []
    spill = spill or Spill(None)
    layers = student.anatomy.moe_layers
    total = len(layers) * (pace.steps if method == "distill" else 1)
    with progress.task("healing", total, "steps") as advance, closing(walk.layers()) as walking:
        for layer in walking:
            for number in (*train, *heldout):
                layer.move(teacher, number)
            if layer.number in layers and method != "none":
                data = block_data(layer, student, teacher, train)
                judge = block_data(layer, student, teacher, heldout)
                values, report = _healed(layer, student, (data, judge), method, pace, advance)
                reports.append(report)
                for name, tensor in values.items():
                    student.overlay.tensors[name] = spill.kept(tensor)
                    layer.rebind(student, name)
            for number in (*train, *heldout):
                layer.move(student, number)
    return reports


def _healed(
    layer: Layer,
    student: Stream,
    sets: tuple[BlockData, BlockData],
    method: Method,
    pace: Pace,
    advance: Advance,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the values that are better, by the running model's names, and the report of the layer."""
    block, (train, heldout) = student.blocks[layer.number], sets
    own = {name: tensor.detach() for name, tensor in block.module.state_dict().items()}
    before = error_of(block, own, heldout)
    if not torch.isfinite(train.target).all():
        raise CheckpointError(f"layer {layer.number}: hidden states are not finite; try --dtype float32")
    report: dict[str, Any] = {"layer": layer.number, "tokens": len(train), "error": before, "steps": []}
    values: dict[str, torch.Tensor] = {}
    error = before
    steps = ["ridge" if method == "distill" else method, *(["distill"] if method == "distill" else [])]
    for step in steps:
        if step == "distill":
            candidate, found = distilled(block, values, train, heldout, pace, advance)
        else:
            candidate = refitted(block, train, heldout, method=step)
            found = error_of(block, {**own, **candidate}, heldout)
        rounded = {name: student.as_stored(f"{block.name}.{name}", tensor) for name, tensor in candidate.items()}
        found = error_of(block, {**own, **rounded}, heldout)
        kept = found < error
        report["steps"].append({"step": step, "error": found, "kept": kept})
        if kept:
            values, error = rounded, found
    report["healed_error"] = error
    if method != "distill":
        advance(1)
    return {f"{block.name}.{name}": tensor for name, tensor in values.items()}, report
