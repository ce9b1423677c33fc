"""What a training asks of whoever has the weights: the gradients of a step, and how good a state is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.judge import Judgement
from moesurgeon.recovery.targets import Experts, Part
from moesurgeon.recovery.teacher_cache import Cached
from moesurgeon.surgery.anatomy import Anatomy


@dataclass(frozen=True)
class Gradients:
    """That a step's gradients are there. ``figures``: of each term before its coefficient; ``norm``: that of the
    objective alone, where it was asked for."""

    figures: dict[str, float]
    norm: float | None = None


class Steps(Protocol):
    """The student where it is: in memory (``resident``) or read layer by layer (``streamed``)."""

    @property
    def anatomy(self) -> Anatomy: ...

    @property
    def device(self) -> torch.device: ...

    def judged(self, parts: Sequence[Part] = (), tensors: Mapping[str, torch.Tensor] | None = None) -> Judgement:
        """Judge the student with ``parts`` as they are by now and as they will be stored, or with ``tensors``."""

    def judged_as(self, teacher: Anatomy) -> Judgement:
        """Judge the student from before the training with the routing of ``teacher``."""

    def begin(self, teacher: Cached | Anatomy, experts: Experts | None) -> Adapted:
        """Put on what is trained, of experts only these; from here on ``teacher`` speaks at every step."""

    def prepare(self, accelerator: Accelerator, optimizer: Any, rate: Any) -> tuple[Any, Any]:
        """Let ``accelerator`` have what it works with; return its optimizer and its rate."""

    def gradients(self, batch: Any, norm_of: Part | None) -> Gradients:
        """Add the gradients of ``batch`` to those of what is trained; ``norm_of``: return the norm at this part.

        That norm is of the objective without the balancing loss, whose gradient would hide that it has none.
        """

    def stored(self, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        """Return the weights of ``parts`` as they are by now, rounded as they will be stored, on the CPU."""
