"""How far a training is, counted in steps: judging takes its part of the time, and has its part of the bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from moesurgeon.progress import Advance
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.judge import Judgement
from moesurgeon.recovery.result import Training
from moesurgeon.recovery.steps import Gradients, Steps
from moesurgeon.recovery.targets import Experts, Part, parts_of
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.surgery.anatomy import Anatomy
from moesurgeon.traces.windows import Corpus

_PASSES = 3  # forward passes that a step takes about as long as: its own and the way back


class Counted:
    """``steps``, of which a bar of ``total`` units is told; a unit is a step. See ``steps.Steps``."""

    def __init__(self, training: Training, heldout: Corpus, teacher: Cached | Anatomy) -> None:
        schedule, parts = training.schedule, parts_of(training.adapt)
        tokens = schedule.rows(training.length) * training.length
        self._judging = sum(heldout.tokens.values()) / (_PASSES * tokens)
        self._every = schedule.judge_every
        before = 2 if isinstance(teacher, Anatomy) else 1
        at_the_end = 1 + (len(parts) if len(parts) > 1 else 0)
        judgements = before + -(-schedule.steps // self._every) + at_the_end
        self.total = schedule.steps + judgements * self._judging
        self._steps: Steps
        self._advance: Advance

    def of(self, steps: Steps, advance: Advance) -> Counted:
        """Return what tells ``advance`` of ``steps``."""
        self._steps, self._advance = steps, advance
        return self

    def done_before(self, steps: int) -> None:
        """Count steps, and the judgements among them, of an earlier run."""
        self._advance(steps + steps // self._every * self._judging)

    @property
    def anatomy(self) -> Anatomy:
        return self._steps.anatomy

    @property
    def device(self) -> torch.device:
        return self._steps.device

    def judged(self, parts: Sequence[Part] = (), tensors: Mapping[str, torch.Tensor] | None = None) -> Judgement:
        found = self._steps.judged(parts, tensors)
        self._advance(self._judging)
        return found

    def judged_as(self, teacher: Anatomy) -> Judgement:
        found = self._steps.judged_as(teacher)
        self._advance(self._judging)
        return found

    def begin(self, teacher: Cached | Anatomy, experts: Experts | None) -> Adapted:
        return self._steps.begin(teacher, experts)

    def prepare(self, accelerator: Accelerator, optimizer: Any, rate: Any) -> tuple[Any, Any]:
        return self._steps.prepare(accelerator, optimizer, rate)

    def gradients(self, batch: Any, norm_of: Part | None) -> Gradients:
        found = self._steps.gradients(batch, norm_of)
        self._advance(1)
        return found

    def stored(self, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        return self._steps.stored(parts)
