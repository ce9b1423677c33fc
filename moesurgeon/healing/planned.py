"""From a healed stream to an edit plan: the cut and what heals it are one write."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from moesurgeon.checkpoint.writer import content_key
from moesurgeon.engine.destinations import Piece
from moesurgeon.engine.streams import Stream
from moesurgeon.surgery import edits
from moesurgeon.surgery.plan import EditPlan, compose, identity


def plan_healed(student: Stream, record: Mapping[str, Any]) -> EditPlan:
    """Return ``student``'s plan with the tensors of its overlay in place of what it would have written.

    ``record`` says how they came about; the names of the replaced tensors are added to it. A tensor whose bytes are
    those that it had is not among them: it stays the source's.
    """
    first = student.overlay.plan
    assert first is not None
    outputs = dict(identity(student.anatomy).outputs)
    replaced = []
    for name, tensor in student.overlay.tensors.items():
        for piece in student.stored_parts(name):
            load = partial(_bytes_of, student, piece, tensor)
            made = load()
            if made == b"".join(student.source.bytes_of(part) for part in first.outputs[piece.source].parts):
                continue
            outputs[piece.source] = edits.replace(student.anatomy.tensors[piece.source], load, key=content_key(made))
            replaced.append(piece.source)
    if not replaced:
        return first
    second = EditPlan(outputs, record=[{"operation": "heal", "replaced": sorted(replaced), **record}])
    return compose(first, second)


def _bytes_of(student: Stream, piece: Piece, tensor: torch.Tensor) -> bytes:
    return student.stored_value(piece, tensor).cpu().view(torch.uint8).numpy().tobytes()
