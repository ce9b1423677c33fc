"""Cuts of small checkpoints to heal, as a whole or stopped at a layer with its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.model import MoeBlock
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.walk import Layer, Walk
from moesurgeon.healing.data import BlockData, block_data
from moesurgeon.healing.heal import heal
from moesurgeon.healing.pace import Method, Pace
from moesurgeon.healing.room import Room
from moesurgeon.pipeline.subject import Subject
from moesurgeon.surgery.plan import EditPlan, compose
from moesurgeon.surgery.prune import plan_prune
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from tests.engine.small import CPU_FLOAT32, source_of
from tests.laws.walks import text

# In two groups as many of each, another choice in every layer.
KEPT = {0: (0, 2, 3, 5, 6, 7), 1: (0, 1, 2, 5, 6, 7), 2: (1, 2, 3, 4, 6, 7), 3: (0, 1, 3, 4, 5, 7)}
LEARN: Sequence[Batch] = [text(48, 48, 48, 48, seed=1), text(60, 51, 40, 33, seed=2), text(64, 64, 64, 64, seed=3)]
HELD: Sequence[Batch] = [text(40, 40, 40, seed=4), text(33, 20, 60, seed=5)]
SHORT = Pace(steps=3, tokens_per_step=256, judge_every=1)


def cut(subject: Subject, *, top_k: int | None = None) -> EditPlan:
    """Six of eight experts, after fewer per token if asked for."""
    kept = {layer: KEPT[layer] for layer in subject.anatomy.moe_layers}
    kept |= {layer: KEPT[subject.anatomy.moe_layers[-1]] for layer in subject.anatomy.mtp_layers}
    if top_k is None:
        return plan_prune(subject.anatomy, kept)
    first = plan_retop(subject.anatomy, RetopSpec(top_k=top_k))
    return compose(first, plan_prune(first.result(subject.anatomy), kept))


@dataclass(frozen=True)
class Healed:
    student: Stream
    teacher: Stream
    reports: list[dict[str, Any]]


def healed(
    subject: Subject,
    plan: EditPlan,
    method: Method,
    *,
    pace: Pace = SHORT,
    merge: bool = False,
    source: Source | None = None,
    folder: Path | None = None,
    learn: Sequence[Batch] = LEARN,
) -> Healed:
    """Heal ``plan`` on random text, with everything in memory or in ``folder``."""
    source = source or source_of(subject)
    teacher, student = Stream(source), Stream(source, Overlay(plan=plan))
    walk = Walk([teacher, student], [*learn, *HELD], folder)
    train, heldout = range(len(learn)), range(len(learn), len(learn) + len(HELD))
    reports = heal(walk, student, teacher, train, heldout, method=method, pace=pace, merge=merge, room=Room(folder))
    return Healed(student, teacher, reports)


@dataclass(frozen=True)
class Stop:
    """A walk that stands at ``layer``; the teacher has moved on already."""

    layer: Layer
    student: Stream
    teacher: Stream
    block: MoeBlock
    train: BlockData
    heldout: BlockData


@contextmanager
def stopped(subject: Subject, plan: EditPlan, *, which: int = 0, placement: Placement = CPU_FLOAT32) -> Iterator[Stop]:
    """Walk to the mixture layer number ``which`` and give its data."""
    source = source_of(subject, placement)
    teacher, student = Stream(source), Stream(source, Overlay(plan=plan))
    walk = Walk([teacher, student], [*LEARN, *HELD])
    learn, held = range(len(LEARN)), range(len(LEARN), len(LEARN) + len(HELD))
    wanted = subject.anatomy.moe_layers[which]
    with closing(walk.layers()) as layers:
        for layer in layers:
            for number in (*learn, *held):
                layer.move(teacher, number)
            if layer.number == wanted:
                train = block_data(layer, student, teacher, learn, Room(), "train")
                heldout = block_data(layer, student, teacher, held, Room(), "heldout")
                yield Stop(layer, student, teacher, student.blocks[wanted], train, heldout)
                return
            for number in (*learn, *held):
                layer.move(student, number)


def with_target(data: BlockData, target: torch.Tensor) -> BlockData:
    return replace(data, target=target)
