"""The two sides of a law: the same training with all weights in memory, and with layers streamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Overlay, Source, Stream
from moesurgeon.engine.whole import filled
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.resident import Resident
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.schedule import endless
from moesurgeon.recovery.steps import Steps
from moesurgeon.recovery.streamed import Streamed, Streaming
from moesurgeon.recovery.targets import parts_of
from moesurgeon.recovery.teacher_cache import Cached, fill_cache
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.surgery.plan import identity
from moesurgeon.traces.windows import Corpus
from tests.engine.small import CPU_FLOAT32, corpus_of, random_windows

LENGTH = 40
PIECE = 60
"""Tokens: a batch of four windows goes through in two or three pieces."""


def other_routing(anatomy: Anatomy) -> Anatomy:
    """Return the anatomy of the same weights with one expert more per token: a teacher that shares them."""
    return replace(anatomy, top_k=anatomy.top_k + 1, top_ks=(anatomy.top_k + 1,) * len(anatomy.top_ks))


def text_for(subject: Subject, count: int = 6) -> Corpus:
    """Windows of different lengths, so that batches are padded."""
    return corpus_of(random_windows("a", count=count, vocabulary=subject.anatomy.config["vocab_size"]))


@dataclass
class Side:
    steps: Steps
    adapted: Adapted
    optimizer: Any
    source: Source

    def gradients(self) -> list[torch.Tensor]:
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in self.adapted.weights()]


@contextmanager
def side(
    subject: Subject,
    training: Training,
    teacher: Cached | Anatomy,
    streaming: Streaming | None,
    placement: Placement = CPU_FLOAT32,
) -> Iterator[Side]:
    """Begin a training of ``subject``, streamed where it is said how, with as few layers in memory as can be."""
    with (
        Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement, "grouped_mm") as source,
        ExitStack() as stack,
    ):
        student = Stream(source, Overlay(plan=identity(subject.anatomy)))
        steps: Steps
        if streaming is None:
            steps = Resident(stack, student, filled(source), text_for(subject), training)
        else:
            source.supply.allow(source.supply.least)
            steps = Streamed(stack, student, streaming, text_for(subject), training)
        torch.manual_seed(0)
        adapted = steps.begin(teacher, None)
        accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        optimizer = torch.optim.AdamW(adapted.weights(), lr=3e-3, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
        optimizer, _rate = steps.prepare(accelerator, optimizer, rate)  # type: ignore[assignment]
        yield Side(steps, adapted, optimizer, source)


def batches(subject: Subject, corpus: Corpus, count: int) -> list[Batch]:
    return list(itertools.islice(endless(corpus, 4, 0, torch.device("cpu")), count))


def cached_of(subject: Subject, folder: Path, corpus: Corpus, training: Training) -> Cached:
    """Let the subject with one expert more per token speak as if it were another model."""
    with Source.of_checkpoint(subject.checkpoint, other_routing(subject.anatomy), CPU_FLOAT32) as source:
        stream = Stream(source, skeleton=source.skeleton)
        fill_cache(
            folder, "digest", stream, corpus=corpus, heldout=corpus, losses=training.losses, length=LENGTH,
            progress=SILENT,
        )  # fmt: skip
    return Cached(folder, corpus, None)


def assert_same_steps(one: Side, other: Side, training: Training, steps: list[Batch], rtol: float = 2e-5) -> None:
    """Take both through ``steps``, always from the same state: losses and gradients are the same to rounding."""
    for number, batch in enumerate(steps):
        other.adapted.load(one.adapted.state())
        norm_of = parts_of(training.adapt)[0] if number == 0 else None
        mine, theirs = (each.steps.gradients(batch, norm_of) for each in (one, other))
        assert list(mine.figures) == list(theirs.figures)
        for name, value in mine.figures.items():
            assert abs(value - theirs.figures[name]) <= rtol * max(abs(value), 1e-3), (number, name)
        assert (mine.norm is None) == (theirs.norm is None) == (number > 0)
        if mine.norm is not None and theirs.norm is not None:
            assert abs(mine.norm - theirs.norm) <= rtol * mine.norm
        found = list(zip(one.gradients(), other.gradients(), strict=True))
        largest = max(float(gradient.abs().max()) for gradient, _ in found)
        assert largest > 1e-5
        for gradient, again in found:
            assert float((gradient - again).abs().max()) <= rtol * largest
        one.optimizer.step()
        for each in (one, other):
            each.optimizer.zero_grad()
