"""What the teacher says of a batch, from wherever it is: the student itself with its adapters off, or a cache.

Only one model is ever in memory. Where teacher and student have the same tensors (another top-k is all that differs),
the student is its own teacher: run with the teacher's top-k and without what is trained. Otherwise the teacher speaks
first, on all of the text, and is let go (``teacher_cache``).

Legend: B windows, T tokens of a window, N tokens of text in a batch, V vocabulary, C tokens whose logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel

from moesurgeon.engine.batches import Batch
from moesurgeon.engine.model import logits_of
from moesurgeon.recovery.adapters import Adapted
from moesurgeon.recovery.estimator import Learning, Routed
from moesurgeon.recovery.layers import outputs
from moesurgeon.recovery.objective import Losses, distillation
from moesurgeon.surgery.anatomy import Anatomy

KEPT = 64
"""C: how many of the teacher's logits a cache holds of a token."""


@dataclass(frozen=True)
class Likeliest:
    """The teacher's distribution at some temperature, its likeliest tokens one by one and the others as one.

    ``indices`` [N, C], ``logq`` [N, C]: their log probabilities; ``logq_rest`` [N]: of all the others together, -inf
    where there are none.
    """

    indices: torch.Tensor
    logq: torch.Tensor
    logq_rest: torch.Tensor

    @classmethod
    def of(cls, logits_NV: torch.Tensor, temperature: float, kept: int = KEPT) -> Likeliest:
        """Keep the likeliest of these logits."""
        scaled = logits_NV.float() / temperature
        total = scaled.logsumexp(-1)
        values, indices = scaled.topk(min(kept, scaled.shape[-1]), dim=-1)
        rest = scaled.scatter(-1, indices, float("-inf")).logsumexp(-1)
        return cls(indices, values - total[:, None], rest - total)

    def divergence(self, student_NV: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return mean KL(teacher | student) x temperature^2 of the distributions with the others as one token.

        By the log-sum inequality at most that of the whole distributions; the same where nothing was put together.
        """
        scaled = student_NV.float() / temperature
        total = scaled.logsumexp(-1)
        logp = scaled.gather(-1, self.indices) - total[:, None]
        kl = (self.logq.exp() * (self.logq - logp)).sum(-1)
        if self.indices.shape[-1] < scaled.shape[-1]:
            rest = scaled.scatter(-1, self.indices, float("-inf")).logsumexp(-1) - total
            # A rest of exactly nothing weighs nothing, whatever the student makes of it.
            share = self.logq_rest.exp()
            kl = kl + torch.where(share > 0, share * (self.logq_rest.clamp_min(-1e4) - rest), 0.0)
        return kl.mean() * temperature**2


@dataclass(frozen=True)
class Said:
    """What the teacher says of a batch: ``logits`` [B, T, V] or the ``likeliest``; by layer the ``routers``' logits
    [N, E] and the ``hidden`` states [N, H]. What is not asked for is empty."""

    logits: torch.Tensor | None = None
    likeliest: Likeliest | None = None
    routers: Sequence[torch.Tensor] = field(default=())
    hidden: Sequence[torch.Tensor] = field(default=())

    def divergence(self, student_BTV: torch.Tensor, text: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the distillation loss of the student's logits."""
        if self.likeliest is not None:
            return self.likeliest.divergence(student_BTV[text], temperature)
        assert self.logits is not None
        return distillation(student_BTV, self.logits, text, temperature)


class Teacher(Protocol):
    """Says of a batch what the objective asks for."""

    def says(self, batch: Batch) -> Said: ...


class Itself:
    """The student as its own teacher: ``anatomy``'s top-k, adapters off."""

    def __init__(
        self, student: PreTrainedModel, adapted: Adapted, learning: Learning, anatomy: Anatomy, losses: Losses
    ) -> None:
        self._student, self._adapted, self._learning = student, adapted, learning
        self._anatomy, self._losses = anatomy, losses

    def says(self, batch: Batch) -> Said:
        with self._adapted.off(), self._learning.routing_as(self._anatomy), self._learning.recording() as routed:
            return heard(self._student, self._anatomy, batch, self._losses, routed)


@torch.no_grad()
def heard(model: PreTrainedModel, anatomy: Anatomy, batch: Batch, losses: Losses, routed: Sequence[Routed]) -> Said:
    """Run ``model`` on ``batch`` and return what ``losses`` ask of it; ``routed`` is filled by the pass."""
    rows = batch.is_text
    with outputs(model, anatomy) if losses.hidden else nullcontext(()) as hidden:
        logits = logits_of(model, batch.tokens, batch.mask)
    return Said(
        logits=logits if losses.objective == "distill" else None,
        routers=[each.logits[rows.flatten()] for each in routed] if losses.router else (),
        hidden=[each[rows] for each in hidden],
    )
