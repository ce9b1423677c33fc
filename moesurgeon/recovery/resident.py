"""A student with all its weights in memory: a step is one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.judge import Judge, Judgement
from moesurgeon.recovery.layers import outputs, recomputed
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.share import Share, add_up, share_of, summed_each
from moesurgeon.recovery.steps import Gradients
from moesurgeon.recovery.targets import Experts, Part, as_stored, parts_of, refuse_unwritable, targets_of
from moesurgeon.recovery.teacher import Itself, Said, Teacher
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.recovery.terms import Heard, Sums, sums_of
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus


class Resident:
    """``model`` with the weights of ``student``; until ``stack`` is left its routers learn. See ``steps.Steps``."""

    def __init__(
        self,
        stack: ExitStack,
        student: Stream,
        model: PreTrainedModel,
        heldout: Corpus,
        training: Training,
        ranks: Ranks | None = None,
    ) -> None:
        self.anatomy, self.device = student.anatomy, model.device
        self._student, self._model, self._training = student, model, training
        self._ranks = ranks or Ranks()
        self._parts = parts_of(training.adapt)
        self._targets = targets_of(model, self.anatomy, training.adapt)
        refuse_unwritable(student, self._targets)
        self._learning = stack.enter_context(
            learning_routers(
                model, self.anatomy, candidates=training.candidates(self.anatomy), capacity=training.schedule.capacity
            )
        )
        if training.schedule.recompute:
            stack.enter_context(recomputed(model, self.anatomy))
        stream = Stream(Source.of_model(model, self.anatomy))
        stream.source.scratch = student.source.scratch
        self._judge = Judge(stream, self._learning, heldout, training.length, ranks=self._ranks)
        self._adapted: Adapted | None = None
        self._teacher: Teacher | None = None
        self._accelerator: Accelerator
        self._running: Any  # what the accelerator made of the model

    def judged(self, parts: Sequence[Part] = (), tensors: Mapping[str, torch.Tensor] | None = None) -> Judgement:
        if self._adapted is None:
            return self._judge.judged()
        with self._adapted.running_with(self.stored(parts) if tensors is None else tensors):
            return self._judge.judged()

    def judged_as(self, teacher: Anatomy) -> Judgement:
        with self._learning.routing_as(teacher):
            return self.judged()

    def begin(self, teacher: Cached | Anatomy, experts: Experts | None) -> Adapted:
        losses, schedule, kind = self._training.losses, self._training.schedule, self._training.adapter
        self._adapted = Adapted(
            self._model, self._targets, rank=schedule.rank, experts=experts, kind=kind, steps=schedule.steps
        )
        if losses.from_teacher:
            self._teacher = (
                Itself(self._model, self._adapted, self._learning, teacher, losses)
                if isinstance(teacher, Anatomy)
                else teacher
            )
        return self._adapted

    def prepare(self, accelerator: Accelerator, optimizer: Any, rate: Any) -> tuple[Any, Any]:
        assert self._adapted is not None
        self._accelerator = accelerator
        if self._ranks.size > 1:  # gradients are added up here (``share``), not averaged by a wrapper
            self._running = self._adapted.model
            optimizer, rate = accelerator.prepare(optimizer, rate)
        else:
            self._running, optimizer, rate = accelerator.prepare(self._adapted.model, optimizer, rate)
        return optimizer, rate

    def gradients(self, batch: Batch, norm_of: Part | None) -> Gradients:
        assert self._adapted is not None
        sums = self._losses(share_of(batch, self._ranks))
        norm = None if norm_of is None else self._norm(sums.main, norm_of)
        self._accelerator.backward(sums.main + sums.beside)
        add_up(self._adapted.weights(), self._ranks)
        return Gradients(dict(sums.figures), norm)

    def stored(self, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        assert self._adapted is not None
        return {name: as_stored(self._student, name, weight) for name, weight in self._adapted.merged(parts)}

    def _losses(self, share: Share) -> Sums:
        """Run the student on its ``share`` of a batch and return what is to become small."""
        losses, learning, batch = self._training.losses, self._learning, share.batch
        said = self._teacher.says(batch) if self._teacher else Said()
        learning.routed.clear()
        learning.is_text = batch.is_text.flatten()
        with ExitStack() as stack:
            hidden = stack.enter_context(outputs(self._model, self.anatomy)) if losses.hidden else []
            logits = self._running(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
        routed = learning.routed[: len(self.anatomy.moe_layers)]
        return sums_of(
            losses, learning.rule, Heard(logits, routed, hidden), said, share, routers="routers" in self._parts
        )

    def _norm(self, main: torch.Tensor, part: Part) -> float:
        assert self._adapted is not None
        parts = torch.autograd.grad(main, self._adapted.weights(part), retain_graph=True)
        return float(torch.nn.utils.get_total_norm(summed_each(parts, self._ranks)))
