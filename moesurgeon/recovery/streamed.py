"""A student whose layers are read at every step: forwards one by one, then backwards, each run again on what it was
given.

A step reads the checkpoint twice, however large its batch, which goes through a layer in pieces. Between the two
passes only the inputs of the layers are kept, in memory or in files. Adapters and masters of routers, which are small,
stay in memory with their gradients; nothing else has any. Where the student is its own teacher, both go through every
layer while it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.hidden import mapped
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.supply import groups_of
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.judge import Judge, Judgement
from moesurgeon.recovery.passes import Passes
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.share import add_up, share_of, summed_each
from moesurgeon.recovery.steps import Gradients
from moesurgeon.recovery.targets import Experts, Part, Target, as_stored, parts_of, refuse_unwritable, targets_of
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus

PIECE = 2048
"""Tokens that go through a layer at once under gradients."""


@dataclass(frozen=True)
class Streaming:
    """Where a streamed training puts what does not fit: ``states`` (a folder for hidden states; None: into memory)
    and ``weights`` (a folder for the best experts). ``piece``: tokens that go through a layer at once."""

    weights: Path
    states: Path | None = None
    piece: int = PIECE


class Streamed:
    """The weights of ``student`` as its source reads them; until ``stack`` is left routers learn. See ``steps``."""

    def __init__(
        self,
        stack: ExitStack,
        student: Stream,
        streaming: Streaming,
        heldout: Corpus,
        training: Training,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        source = student.source
        self.anatomy, self.device = student.anatomy, source.placement.device
        self._student, self._source, self._streaming, self._training = student, source, streaming, training
        model = source.skeleton.model
        self._targets = targets_of(model, self.anatomy, training.adapt)
        refuse_unwritable(student, self._targets)
        self._learning = stack.enter_context(
            learning_routers(
                model, self.anatomy, candidates=training.candidates(self.anatomy), capacity=training.schedule.capacity
            )
        )
        self._stream = Stream(source, skeleton=source.skeleton)
        self._judge = Judge(self._stream, self._learning, heldout, training.length, streaming.states, ranks=self._ranks)
        self._adapted: Adapted | None = None
        self._passes: Passes

    def judged(self, parts: Sequence[Part] = (), tensors: Mapping[str, torch.Tensor] | None = None) -> Judgement:
        if self._adapted is None:
            return self._judge.judged()
        with self._adapted.off(), self._running_with(self._adapted, parts, tensors):
            return self._judge.judged()

    def judged_as(self, teacher: Anatomy) -> Judgement:
        with self._learning.routing_as(teacher):
            return self.judged()

    def begin(self, teacher: Cached | Anatomy, experts: Experts | None) -> Adapted:
        training, skeleton = self._training, self._source.skeleton
        holders = {target.name.rpartition(".")[0] for target in self._targets}
        held = [name for name in skeleton.targets if name.rpartition(".")[0] in holders]
        for name in held:  # of what gets an adapter, and what is beside it, peft looks at shape, dtype and device
            spec = skeleton.targets[name]
            skeleton.put(name, torch.empty(1, dtype=spec.dtype, device=self.device).expand(spec.shape))
        for name, tensor in self._source.read([each.name for each in self._targets if not each.low_rank]).items():
            skeleton.put(name, tensor)
        schedule, kind = training.schedule, training.adapter
        self._adapted = Adapted(
            skeleton.model, self._targets, rank=schedule.rank, experts=experts, kind=kind, steps=schedule.steps
        )
        skeleton.clear(held)
        self._passes = Passes(
            self._stream,
            self._adapted,
            self._learning,
            training.losses,
            teacher if training.losses.from_teacher else None,
            folder=self._streaming.states,
            # Who is dropped depends on the whole batch.
            piece=None if training.schedule.capacity is not None else self._streaming.piece,
        )
        return self._adapted

    def prepare(self, accelerator: Accelerator, optimizer: Any, rate: Any) -> tuple[Any, Any]:
        prepared: tuple[Any, Any] = accelerator.prepare(optimizer, rate)
        return prepared

    def gradients(self, batch: Batch, norm_of: Part | None) -> Gradients:
        assert self._adapted is not None
        losses = self._training.losses
        beside = "routers" in parts_of(self._training.adapt) and (losses.balance > 0 or losses.z > 0)
        norm = None
        with closing(self._passes.forward(share_of(batch, self._ranks))) as backwards:
            next(backwards)
            # If the norm is asked for: the objective alone, in a pass of its own, once in a training.
            figures = backwards.send(beside and norm_of is None)
            if norm_of is not None:
                found = [weight.grad for weight in self._adapted.weights(norm_of) if weight.grad is not None]
                norm = float(torch.nn.utils.get_total_norm(summed_each(found, self._ranks)))
                if beside:
                    for weight in self._adapted.weights():
                        weight.grad = None
                    figures = backwards.send(True)
        add_up(self._adapted.weights(), self._ranks)
        return Gradients(dict(figures), norm)

    def stored(self, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        assert self._adapted is not None
        found = {}
        for number, target in enumerate(self._targets):
            if target.part not in parts:
                continue
            weight = self._source.read([target.name])[target.name]
            value = self._as_stored(self._adapted, target, weight)
            if target.part == "experts":
                self._streaming.weights.mkdir(parents=True, exist_ok=True)
                path = self._streaming.weights / f"{number}.weights"
                (place,) = mapped([tuple(value.shape)], value.dtype, path, "the best weights")
                value = place.copy_(value)
            found[target.name] = value
        return found

    @contextmanager
    def _running_with(
        self, adapted: Adapted, parts: Sequence[Part], tensors: Mapping[str, torch.Tensor] | None
    ) -> Iterator[None]:
        """Inside the context the stream has what is trained, as it will be stored, in place of what it was."""
        overlay = self._stream.overlay
        if tensors is not None:
            overlay.tensors.update(tensors)
        else:
            for target in self._targets:
                if target.part in parts:
                    overlay.changes[target.name] = partial(self._as_stored, adapted, target)
        try:
            yield
        finally:
            overlay.tensors.clear()
            overlay.changes.clear()

    def _as_stored(self, adapted: Adapted, target: Target, weight: torch.Tensor) -> torch.Tensor:
        return as_stored(self._student, target.name, adapted.merged_with(target, weight))


def bytes_per_step(source: Source) -> int:
    """Return how many bytes of the checkpoint a streamed step reads: what stays in memory is read once for all."""
    groups, kept = groups_of(source.skeleton), source.supply.plan.kept
    lowest = min(source.anatomy.moe_layers) + 1
    twice = range(lowest, source.layers + 1)
    return sum(
        source.stored_bytes(names) * (2 if group in twice else 1)
        for group, names in enumerate(groups)
        if group not in kept
    )
